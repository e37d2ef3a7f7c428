"""What every implementation must satisfy, as functions that raise AssertionError, for tests and the list of faults."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from peftkernels import RankPlan, RankState, lora_linear
from peftkernels.backends.triton.linear import routes
from peftkernels.ops import reference
from peftkernels.ops.schemas import rank_dtype
from support import philox
from support.cases import DTYPES, GRADIENTS, TRAINABLE, Call, Outcome, make_call, run
from support.devices import CPU, device_of
from support.implementations import interpreted, served
from support.oracle import Budget, oracle


def within_budget(call: Call, impl: str, budget: Budget | None = None, needs: tuple[str, ...] | None = None) -> None:
    """y and every gradient are as exact as the budget of `support.oracle` demands."""
    excesses = (budget or Budget(call)).excesses(run(call, impl, needs))
    assert not excesses, f"{impl}, {call.label}:\n  " + "\n  ".join(map(str, excesses))


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(found, expected), (
        f"{what}: bits differ in {int((found != expected).sum())} of {expected.numel()} elements"
    )


def cut(call: Call) -> Call:
    """The same call with its DEAD ranks cut out."""
    keep = call.state != RankState.DEAD
    state = call.state[keep]
    plan = None if bool((state == RankState.ACTIVE).all()) else RankPlan.from_state(state)
    return call.replace(
        lora_A=call.lora_A[keep].clone(),
        lora_B=call.lora_B[:, keep].clone(),
        gate=None if call.gate is None else call.gate[keep].clone(),
        rank_plan=plan,
    )


def masked_equals_sliced(call: Call, impl: str) -> None:
    """A DEAD rank leaves the same bits as the call with that rank cut out, and gradients of exact zeros."""
    keep = call.state != RankState.DEAD
    masked, sliced = run(call, impl), run(cut(call), impl)
    _same(masked.y, sliced.y, f"{impl}, {call.label}, y")
    rows = {"lora_A": 0, "lora_B": 1, "gate": 0}
    for name, expected in sliced.gradients.items():
        found = masked.gradients[name]
        if name in rows:
            dead = found.index_select(rows[name], (~keep).nonzero().squeeze(1))
            assert not dead.any(), f"{impl}, {call.label}: ∂{name} of a DEAD rank is not zero"
            found = found.index_select(rows[name], keep.nonzero().squeeze(1))
        _same(found, expected, f"{impl}, {call.label}, ∂{name}")


def follows_rank_states(call: Call, impl: str) -> None:
    """The gradient table: ACTIVE receives all, PROBE its gate's dense gradient alone, DEAD nothing."""
    call = call.on(CPU)
    outcome = run(call, impl)
    active, live = call.state == RankState.ACTIVE, call.state != RankState.DEAD
    grad_A, grad_B, grad_gate = (outcome.gradients[name] for name in ("lora_A", "lora_B", "gate"))
    assert not grad_A[~active].any(), f"{impl}, {call.label}: ∂A of a rank that is not ACTIVE is not zero"
    assert not grad_B[:, ~active].any(), f"{impl}, {call.label}: ∂B of a rank that is not ACTIVE is not zero"
    assert not grad_gate[~live].any(), f"{impl}, {call.label}: ∂gate of a DEAD rank is not zero"
    assert grad_A[active].any(1).all(), f"{impl}, {call.label}: an ACTIVE rank has no ∂A"
    assert grad_B[:, active].any(0).all(), f"{impl}, {call.label}: an ACTIVE rank has no ∂B"
    # ∂gate_i = scaling · Σ S·H does not depend on anybody's state: without a plan it is the same.
    dense = Budget(call.replace(rank_plan=None))
    mixed = dense.exact["∂gate"].clone()
    mixed[live] = grad_gate[live].double()
    excesses = [excess for excess in dense.excesses(Outcome(call.grad_y, {"gate": mixed})) if excess.name == "∂gate"]
    assert not excesses, f"{impl}, {call.label}: ∂gate is not the dense one: {excesses[0]}"


def contains_dead_ranks(call: Call, impl: str, poison: float = float("nan")) -> None:
    """What lies in a DEAD rank's factors and gate changes no bit of any result."""
    assert call.gate is not None
    dead = call.state == RankState.DEAD
    clean = run(call, impl).named()
    lora_A, lora_B, gate = call.lora_A.clone(), call.lora_B.clone(), call.gate.clone()
    lora_A[dead], lora_B[:, dead], gate[dead] = poison, poison, poison
    poisoned = run(call.replace(lora_A=lora_A, lora_B=lora_B, gate=gate), impl).named()
    for name, expected in clean.items():
        _same(poisoned[name], expected, f"{impl}, {call.label}, {poison} in DEAD ranks, {name}")


def contains_probe_ranks(call: Call, impl: str, poison: float = float("nan")) -> None:
    """What lies in a PROBE rank's factors and gate reaches its own ∂gate and nothing else."""
    assert call.gate is not None
    probe = call.state == RankState.PROBE
    clean = run(call, impl)
    lora_A, lora_B, gate = call.lora_A.clone(), call.lora_B.clone(), call.gate.clone()
    lora_A[probe], lora_B[:, probe], gate[probe] = poison, poison, poison
    poisoned = run(call.replace(lora_A=lora_A, lora_B=lora_B, gate=gate), impl)
    own = poisoned.gradients.pop("gate")
    _same(own[~probe], clean.gradients.pop("gate")[~probe], f"{impl}, {call.label}, ∂gate of other ranks")
    assert not own[probe].isfinite().any(), f"{impl}, {call.label}: ∂gate of a poisoned PROBE rank is finite"
    for name, expected in clean.named().items():
        _same(poisoned.named()[name], expected, f"{impl}, {call.label}, {poison} in PROBE ranks, {name}")


def propagates(call: Call, impl: str, name: str, poison: float = float("nan")) -> None:
    """One NaN or inf in the argument `name` reaches exactly the results that the reference says it reaches."""
    value = getattr(call, name).clone()
    index = [size // 2 for size in value.shape]
    if name in ("lora_A", "lora_B", "gate"):
        active = (call.state == RankState.ACTIVE).nonzero().squeeze(1)
        index[1 if name == "lora_B" else 0] = int(active[len(active) // 2])
    value[tuple(index)] = poison
    poisoned = call.replace(**{name: value})
    expected, found = oracle(poisoned).named(), run(poisoned, impl).named()
    assert not expected["y"].isfinite().all() or name == "grad_y", "the poison does not reach y: the test is empty"
    for result, value in found.items():
        wrong = value.isfinite() != expected[result].isfinite()
        assert not wrong.any(), (
            f"{impl}, {call.label}: {poison} in {name}: {int(wrong.sum())} elements of {result} are finite where the "
            "reference is not, or not finite where it is"
        )


def follows_factors_of_any_size(call: Call, impl: str, exponent: int = 20) -> None:
    """A·2ᵉ beside B·2⁻ᵉ give the bits of A beside B, and gradients that differ by that power alone.

    S is then beyond float16 and G·B below it: nothing that has one number per rank may pass through either.
    """
    assert call.lora_A.dtype in (torch.float32, torch.float64), "the factors themselves would not hold such values"
    power = 2.0**exponent
    scaled = run(call.replace(lora_A=call.lora_A * power, lora_B=call.lora_B / power), impl).named()
    for name, expected in run(call, impl).named().items():
        factor = {"∂lora_A": 1 / power, "∂lora_B": power}.get(name, 1.0)
        _same(scaled[name], expected * factor, f"{impl}, {call.label}, A and B times {power:g} and its inverse, {name}")


def drops_as_philox_says(
    impl: str, seed: int, p: float, leading: tuple[int, ...] = (9,), k: int = 13, dtype: str = "fp32"
) -> None:
    """The mask of forward, ∂x and ∂A, read off a call with W = 0, A = B = 1, is the one that plain integers give."""
    with device_of(impl):
        _drops_as_philox_says(impl, seed, p, leading, k, dtype)


def _drops_as_philox_says(impl: str, seed: int, p: float, leading: tuple[int, ...], k: int, dtype: str) -> None:
    kind, rows = DTYPES[dtype][0], torch.Size(leading).numel()
    factor = philox.kept(seed, p, rows, k).double() * (1 / (1 - p))
    identity = torch.eye(k, dtype=kind)
    x = torch.ones(*leading, k, dtype=kind, requires_grad=True)
    lora_A = identity.clone().requires_grad_()
    keywords = {"dropout_p": p, "dropout_seed": seed, "impl": impl}
    y = lora_linear(x, torch.zeros_like(identity), lora_A, identity, **keywords)
    expected = factor.to(kind).view(x.shape)
    where = f"{impl}, seed={seed} p={p} x={tuple(x.shape)} {dtype}"
    _same(y.detach(), expected, f"{where}, mask of y")
    # Row t of G picks rank t mod K, so that ∂A's row i sums the masks of rows i, i + K, i + 2K, …
    picks = torch.arange(rows) % k
    y.backward(identity[picks].view(y.shape), retain_graph=True)
    sums = torch.zeros(k, k, dtype=torch.float64).index_add_(0, picks, factor.to(kind).double())
    assert lora_A.grad is not None
    if rows <= k:
        _same(lora_A.grad, sums.to(kind), f"{where}, mask of ∂A")
    else:
        assert torch.allclose(lora_A.grad.double(), sums, rtol=2 * torch.finfo(kind).eps * rows**0.5, atol=0), where
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    _same(grad_x, expected, f"{where}, mask of ∂x")


def repeats(call: Call, impl: str) -> None:
    """The same inputs give the same bits."""
    first = run(call, impl).named()
    for name, again in run(call, impl).named().items():
        _same(again, first[name], f"{impl}, {call.label}, second run, {name}")


def subsets_agree(call: Call, impl: str) -> None:
    """Every subset of trainable arguments gets the bits that it gets when all are asked for (`run` checks the rest).

    Where `impl` is interpreted: nothing, each argument alone, and all but each.
    """
    full = run(call, impl, TRAINABLE)
    sizes = (0, 1, len(TRAINABLE) - 1) if interpreted(impl) else range(len(TRAINABLE) + 1)
    for needs in (needs for size in sizes for needs in combinations(TRAINABLE, size)):
        some = run(call, impl, needs)
        _same(some.y, full.y, f"{impl}, {call.label}, needs={needs}, y")
        for name, gradient in some.gradients.items():
            _same(gradient, full.gradients[name], f"{impl}, {call.label}, needs={needs}, ∂{name}")


def reads_a_given_shrink(call: Call, impl: str) -> None:
    """y and the gradients of B and of the gate follow an S that is given, in place of x·Aᵀ and whatever it holds."""
    rows = call.x.shape[:-1].numel()
    generator = torch.Generator().manual_seed(rows)
    shrink = torch.randn(rows, call.r + 5, generator=generator, device="cpu").to(rank_dtype(call.x.dtype))[:, 3:-2]
    # Where one launch does everything, Triton's kernels make their own.
    with routes.forced(routes.Choice(routes.LIBRARY)):
        found = run(call.replace(shrink=shrink.to(call.x.device)), impl).on(CPU)
    with CPU:
        here = call.on(CPU)
        record = here.replace(shrink=shrink).record()
        y, _ = reference.lora_linear_forward(record)
        gradients = reference.lora_linear_backward(record.backward(here.grad_y, [True] * 6))
    torch.testing.assert_close(found.y, y, msg=lambda why: f"{impl}, {call.label}, y: {why}")
    for name, expected in zip(GRADIENTS, gradients, strict=True):
        if name in found.gradients:
            why = f"{impl}, {call.label}, ∂{name} "
            torch.testing.assert_close(found.gradients[name], expected, msg=lambda text, why=why: why + text)


# Every check on a call where a fault of its kind shows; each takes an implementation and a seed.
def reads_plans_of_views(call: Call, impl: str) -> None:
    """A plan whose tensors are columns of a table is the same plan."""
    assert call.rank_plan is not None

    def column(value: Tensor) -> Tensor:
        table = value.new_ones(value.numel(), 3)
        table[:, 1] = value
        return table[:, 1]

    plan = RankPlan(*(column(value) for value in (call.rank_plan.state, call.rank_plan.order, call.rank_plan.counts)))
    expected, found = run(call, impl).named(), run(call.replace(rank_plan=plan), impl).named()
    for name, value in expected.items():
        _same(found[name], value, f"{impl}, {call.label}, plan of views, {name}")


CHECKS: dict[str, Callable[[str, int], None]] = {
    "budget": lambda impl, seed: within_budget(make_call(seed, leading=(140,), n=70, k=90, r=9), impl),
    "budget of all gradients": lambda impl, seed: within_budget(
        make_call(seed, leading=(3, 11), r=12, plan=True, dropout_p=0.3, scaling="tensor"), impl
    ),
    "budget in low precision": lambda impl, seed: within_budget(
        make_call(seed, plan=True, r=8, dtype=served(impl, ("bf16-fp32_factors", "fp16-fp32_factors"))[0]), impl
    ),
    "factors of any size": lambda impl, seed: follows_factors_of_any_size(
        make_call(seed, plan=True, r=8, dtype=served(impl, ("fp16-fp32_factors", "bf16-fp32_factors"))[0]), impl
    ),
    "masked equals sliced": lambda impl, seed: masked_equals_sliced(make_call(seed, r=9, plan=True), impl),
    "plans of views": lambda impl, seed: reads_plans_of_views(make_call(seed, r=9, plan=True), impl),
    "rank states": lambda impl, seed: follows_rank_states(make_call(seed, r=9, plan=True), impl),
    "DEAD ranks contained": lambda impl, seed: contains_dead_ranks(make_call(seed, r=9, plan=True), impl),
    "PROBE ranks contained": lambda impl, seed: contains_probe_ranks(make_call(seed, r=9, plan=True), impl),
    "NaN propagates": lambda impl, seed: propagates(make_call(seed), impl, "x"),
    "dropout mask": lambda impl, seed: drops_as_philox_says(impl, seed, 0.4),
    "determinism": lambda impl, seed: repeats(make_call(seed), impl),
    "given shrink": lambda impl, seed: reads_a_given_shrink(make_call(seed, r=6, plan=True), impl),
    "subsets": lambda impl, seed: subsets_agree(make_call(seed, plan=True, dropout_p=0.2), impl),
}
