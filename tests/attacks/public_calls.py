"""Random calls of the public functions, most of them with one or two arguments that do not belong there.

A call raises TypeError, ValueError or RuntimeError with the argument's name, or its results are those of the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from support.cases import GRADIENTS, Call, Outcome, make_call
from support.oracle import Budget
from torch import Tensor

from attacks.attack import Counts, in_children
from peftkernels import RankPlan, explain, lora_linear

NAME = "public-calls"
TITLE = "random and wrong arguments of lora_linear and explain, forward and backward"
SHORT, LONG = 400, 20_000

IMPLEMENTATIONS = ("auto", "auto", "cpu", "eager", "reference", "triton")
MATRICES = ("x", "weight", "lora_A", "lora_B")
TENSORS = (*MATRICES, "bias", "gate", "shrink")
ARGUMENTS = (*TENSORS, "rank_plan", "scaling", "dropout_p", "dropout_seed", "impl")
# What an error may speak of instead of the argument that was replaced, which is right as seen from the other one.
PARTNERS = {
    "x": ("weight", "lora_A", "bias", "gate", "scaling", "shrink", "rank_plan", "dropout_seed"),
    "weight": ("x", "lora_A", "lora_B", "bias"),
    "lora_A": ("lora_B", "weight", "gate", "rank_plan", "shrink"),
    "lora_B": ("lora_A", "weight"),
    "dropout_p": ("shrink",),
}
NUMBERS: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**63, 2**64, -(2**70), 1e400, -1e400, float("nan"), 1e38, 1e-320, 0.5, 0.999999999, 1.0, "1",
    b"", 1j, [], {}, object, numpy.float32(0.25), numpy.float64(0.25), numpy.int64(3), numpy.bool_(True),
    numpy.ones(1), torch.tensor(0.5), torch.tensor(3), torch.tensor([0.5]), torch.tensor(1j), torch.tensor(True),
    torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, device="meta"),
)  # fmt: skip


def _shapes(shape: tuple[int, ...], dice: random.Random) -> tuple[int, ...]:
    """A shape that is nearly this one."""
    sizes = list(shape)
    what = dice.randrange(6)
    if what == 0:
        return ()
    if what == 1:
        return (*sizes, 1)
    if what == 2 and sizes:
        sizes.pop(dice.randrange(len(sizes)))
    elif what == 3 and sizes:
        sizes[dice.randrange(len(sizes))] = dice.choice((0, 1, 2, 65))
    elif what == 4:
        sizes.reverse()
    elif sizes:
        place = dice.randrange(len(sizes))
        sizes[place] = max(0, sizes[place] + dice.choice((-1, 1)))
    return tuple(sizes)


def _freed(value: Tensor) -> Tensor:
    """The tensor as FSDP leaves it: its storage is gone."""
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def _shortened(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(value.untyped_storage().nbytes() // 2)
    return value


def _spaced(value: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = value.new_full([size * 2 for size in value.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
    return view.copy_(value)


def _nested(value: Tensor) -> Tensor:
    return torch.nested.nested_tensor([value.reshape(-1, 1), value.reshape(-1, 1)[:1]])


# Each makes something else of a tensor; what stays legal must give the right values.
TENSOR_CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda value, dice: None,
    lambda value, dice: dice.choice(NUMBERS),
    lambda value, dice: value.tolist(),
    lambda value, dice: value.detach().numpy() if value.dtype is not torch.bfloat16 else value.float().numpy(),
    lambda value, dice: value.to(dice.choice((torch.int64, torch.bool, torch.complex64, torch.uint8))),
    lambda value, dice: value.to(dice.choice((torch.float64, torch.float16, torch.bfloat16, torch.float32))),
    lambda value, dice: value.to(torch.float8_e4m3fn),
    lambda value, dice: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8),
    lambda value, dice: torch.randn(_shapes(tuple(value.shape), dice)).to(value.dtype),
    lambda value, dice: value.to("meta"),
    lambda value, dice: value.to_sparse(),
    lambda value, dice: value.to_sparse_csr() if value.dim() == 2 else value.to_sparse(),
    lambda value, dice: _nested(value),
    lambda value, dice: _freed(value),
    lambda value, dice: _shortened(value),
    lambda value, dice: _spaced(value),
    lambda value, dice: value.mT.contiguous().mT if value.dim() >= 2 else value,
    lambda value, dice: value[..., :1].expand(value.shape),
    lambda value, dice: value[:1].expand(value.shape) if value.dim() else value,
    lambda value, dice: value.conj() if value.is_complex() else torch._neg_view(value),
    lambda value, dice: value * dice.choice((0.0, 1e30, float("inf"), float("nan"))),
)


def _plan(plan: RankPlan | None, r: int, dice: random.Random) -> Any:
    """Something in the place of a rank plan."""
    good = RankPlan.from_state(torch.tensor([dice.randrange(3) for _ in range(r)], dtype=torch.uint8))
    what = dice.randrange(9)
    if what == 0:
        return dice.choice(NUMBERS)
    if what == 1:
        return good.state
    if what == 2:
        return RankPlan.from_mask(torch.ones(r + 1, dtype=torch.bool))
    names = ("state", "order", "counts")
    parts: dict[str, Any] = {name: getattr(good, name).clone() for name in names}
    name = dice.choice(names)
    if what == 3:
        parts[name] = _spaced_integers(parts[name])
    elif what == 4:
        parts[name] = parts[name].to(dice.choice((torch.int64, torch.float32, torch.uint8, torch.int32)))
    elif what == 5:
        parts[name] = parts[name].fill_(dice.choice((0, 1, 2, 3, 200)))
    elif what == 6:
        limits = torch.iinfo(parts[name].dtype)
        parts[name] = torch.randint(limits.min, limits.max, parts[name].shape).to(parts[name].dtype)
    elif what == 7:
        parts[name] = parts[name][:1]
    else:
        parts[name] = _freed(parts[name])
    return RankPlan(**parts)


def _spaced_integers(value: Tensor) -> Tensor:
    wide = torch.full((2 * value.numel(),), 1, dtype=value.dtype)
    view = wide[::2]
    return view.copy_(value)


def _random_call(seed: int, dice: random.Random) -> Call:
    return make_call(
        seed,
        leading=dice.choice(((), (1,), (3,), (2, 5), (0,), (40,))),
        n=dice.choice((1, 7, 33, 64)),
        k=dice.choice((1, 8, 29, 64)),
        r=dice.choice((0, 1, 5, 16)),
        dtype=dice.choice(("fp32", "fp32", "fp32", "bf16", "bf16-fp32_factors", "fp64", "fp32-bf16_factors")),
        bias=dice.random() < 0.5,
        gate=dice.random() < 0.5,
        plan=dice.random() < 0.4,
        scaling=dice.choice((1.7, "tensor")),
        dropout_p=dice.choice((0.0, 0.0, 0.3)),
    )


def _changed(call: Call, name: str, dice: random.Random) -> Any:
    """Another value for one argument."""
    if name == "impl":
        return dice.choice(("CPU", "", "cuda", None, 3, b"cpu", "eager ", "triton"))
    if name == "rank_plan":
        return _plan(call.rank_plan, call.r, dice)
    if name in ("scaling", "dropout_p", "dropout_seed"):
        return dice.choice(NUMBERS)
    value = getattr(call, name)
    if value is None:
        value = torch.randn(call.weight.shape[0] if name == "bias" else (call.r,))
        if name == "shrink":
            value = torch.randn(call.x.shape[:-1].numel(), call.r).to(call.x.dtype)
    return dice.choice(TENSOR_CHANGES)(value, dice)


def one(at: int, seed: int) -> tuple[str, str | None]:
    """One call with up to two changed arguments: "refused", "right", or what is wrong with it."""
    dice = random.Random(f"{seed} {at}")
    torch.manual_seed(dice.randrange(2**31))
    call = _random_call(dice.randrange(2**31), dice)
    arguments: dict[str, Any] = {**{name: getattr(call, name) for name in MATRICES}, **call.optional}
    arguments["impl"] = dice.choice(IMPLEMENTATIONS)
    names = dice.sample(ARGUMENTS, dice.choice((0, 1, 1, 1, 2)))
    try:
        for name in names:
            arguments[name] = _changed(call, name, dice)
    except Exception as error:
        # PyTorch itself, or a plan, refuses to make such a value.
        return "not to be made", None if isinstance(error, (TypeError, ValueError, RuntimeError)) else repr(error)
    said = f"{call.label}, {arguments['impl']}, changed: {', '.join(names) or 'nothing'}"
    recorded = dice.random() < 0.6
    try:
        outcome = _run(arguments, call.grad_y, recorded, dice.random() < 0.2)
    except (TypeError, ValueError, RuntimeError) as error:
        return "refused", _misnamed(str(error), names, said)
    except Exception as error:
        return "wrong", f"{said}: {type(error).__name__}: {error}"
    return "served", _wrong(arguments, call, outcome, said)


def _run(arguments: dict[str, Any], grad_y: Tensor, recorded: bool, explained: bool) -> Outcome:
    given = dict(arguments)
    if explained:
        explain(**{name: value for name, value in given.items() if name != "impl"})
    leaves = {}
    if recorded:
        for name in GRADIENTS:
            value = given[name]
            trained = name != "weight" or given["impl"] in ("eager", "reference")
            if trained and isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested:
                leaves[name] = given[name] = value.detach().requires_grad_()
    y = lora_linear(given.pop("x"), given.pop("weight"), given.pop("lora_A"), given.pop("lora_B"), **given)
    if leaves and y.requires_grad:
        y.backward(grad_y.to(y.dtype) if grad_y.shape == y.shape else torch.ones_like(y))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome(y.detach(), gradients)


def _misnamed(words: str, names: list[str], said: str) -> str | None:
    """What is wrong with an error: it must name a changed argument, or one that does not fit it."""
    if words.startswith("impl=") and "cannot serve this call: x is" in words:
        # The implementation that was named does not compute in this dtype.
        return None
    if not names:
        return f"{said}: refused: {words}"
    allowed = [*names, *(partner for name in names for partner in PARTNERS.get(name, ()))]
    if not any(name in words for name in allowed):
        return f"{said}: the error does not name the argument: {words}"
    return None


def _consistent(plan: RankPlan | None) -> bool:
    """Return True if the order and the counts of a plan are those of its states; others mean nothing."""
    if plan is None:
        return True
    if bool((plan.state > 2).any()):
        return False
    made = RankPlan.from_state(plan.state)
    return torch.equal(made.order, plan.order) and torch.equal(made.counts, plan.counts)


def _wrong(arguments: dict[str, Any], call: Call, outcome: Outcome, said: str) -> str | None:
    """What is wrong with the results of a call that was served."""
    made = {name: value for name, value in arguments.items() if name != "impl"}
    try:
        made["scaling"] = made["scaling"] if isinstance(made["scaling"], Tensor) else float(made["scaling"])
        made["dropout_p"] = float(made["dropout_p"])
        if made["dropout_seed"] is None and made["dropout_p"] > 0:
            return None
        if made["dropout_seed"] is not None:
            made["dropout_seed"] = int(made["dropout_seed"])
        legal = call.replace(**made)
        if legal.shrink is not None:
            # Whatever it holds is used: the oracle has nothing to say.
            return None
        if outcome.y.shape != (*legal.x.shape[:-1], legal.weight.shape[0]):
            return f"{said}: y has shape {tuple(outcome.y.shape)}"
        if legal.grad_y.shape != outcome.y.shape:
            legal = legal.replace(grad_y=torch.ones_like(outcome.y))
        if not abs(legal.scaling) < 1e6 or not all(v.isfinite().all() for v in legal.tensors().values()):
            # What overflows has no budget.
            return None
        if legal.gate is not None:
            legal = legal.replace(gate=legal.gate.reshape(-1))
            if "gate" in outcome.gradients:
                outcome.gradients["gate"] = outcome.gradients["gate"].reshape(-1)
        if not _consistent(legal.rank_plan):
            return None
        budget = Budget(legal)
    except Exception as error:
        return f"{said}: served, though the reference cannot compute it: {type(error).__name__}: {error}"
    excesses = [excess for excess in budget.excesses(outcome) if torch.isfinite(budget.exact[excess.name]).all()]
    return f"{said}: {'; '.join(map(str, excesses))}" if excesses else None


def run(rounds: int, seed: int) -> Counts:
    """As many calls as ``rounds``, in child processes."""
    return in_children(NAME, rounds, seed)
