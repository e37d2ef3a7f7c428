"""Results are checked before a speed is printed.

What peftkernels computes may be twice as far from float64 results (`peftkernels.ops.reference`) as plain PyTorch in the
same dtype, plus a rounding band of (2·eps + √n·eps_sum) times the result's size, n being the number of terms that are
summed. The largest error is held to this and so is the root mean square, so that one bad column cannot hide. Peers
round elsewhere; they only have to compute the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import data, lineup
from bench.cases import Case
from bench.layers import LayerBench
from peftkernels.ops import reference

SEED = 20261
# Relative root mean square by which a peer's y may differ: bfloat16 rounds to 0.4 %, in several places.
MOST_PEER_DIFFERENCE = 0.02


class WrongResultError(Exception):
    """A contestant's results are not what its case asks for; the message says which and by how much."""


# y and, for a case that trains, the gradients of x, A, B and the gate, by name.
Results = Mapping[str, Tensor]


class Subject(Protocol):
    """What is verified: a case on its weights and inputs, anywhere."""

    case: Case
    dtype: torch.dtype
    adapter: data.Adapter
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor]

    @property
    def weight(self) -> Tensor:
        """The frozen weight (N, K)."""

    def frozen(self, x: Tensor) -> Tensor:
        """The layer without an adapter."""

    def fused(
        self, adapter: data.Adapter, dropout: float, impl: str = "auto", seed: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """`lora_linear` on the layer."""


def verify(bench: LayerBench) -> None:
    """Check every contestant of a layer's case; raises WrongResultError."""
    case = bench.case
    exact, typed = _oracle(bench, bench.adapter, case.dropout), plain(bench, bench.adapter, case.dropout)
    for name, impl in ((lineup.OURS, "auto"), (lineup.FLOOR, "eager")):
        check(case, name, fused(bench, bench.adapter, case.dropout, impl), typed, exact)
    if lineup.HALF_RANK in bench.contestants:
        half = bench.adapter.half()
        found = fused(bench, half, 0.0, "auto")
        check(case, lineup.HALF_RANK, found, plain(bench, half, 0.0), _oracle(bench, half, 0.0))
    if case.dropout:
        exact, typed = _oracle(bench, bench.adapter, 0.0), plain(bench, bench.adapter, 0.0)
        check(case, lineup.NO_DROPOUT, fused(bench, bench.adapter, 0.0, "auto"), typed, exact)
        return
    for name in bench.contestants:
        if name == lineup.EAGER or name.startswith("peft "):
            with torch.no_grad():
                check_peer(case, name, bench.contestants[name].call(bench.inputs[0]), exact["y"])


def check_peer(case: Case, name: str, found: Tensor, exact: Tensor) -> None:
    """Raise WrongResultError unless a peer's y is the exact one but for rounding."""
    difference = float(_rms(found.double() - exact) / _rms(exact))
    if not difference <= MOST_PEER_DIFFERENCE:
        raise WrongResultError(
            f"{case.id}: {name} computes something else: y differs by {difference:.2g} of its size, "
            f"at most {MOST_PEER_DIFFERENCE:g} is rounding; nothing was timed"
        )


def check(case: Case, name: str, found: Results, plain: Results, exact: Results) -> None:
    """Raise WrongResultError unless everything in `exact` was found, within the error that `plain` allows."""
    dtype = data.dtypes(case)[0]
    eps_sum = torch.finfo(torch.float32).eps
    terms = case.K + case.N + case.M + case.r
    for what, right in exact.items():
        value = found[what]
        eps = max(torch.finfo(each).eps for each in (dtype, value.dtype))
        band = 2 * eps + terms**0.5 * eps_sum
        error, base = value.double() - right, plain[what].double() - right
        for size, measure in (("largest", _largest), ("root mean square", _rms)):
            wrong, allowed = float(measure(error)), float(2 * measure(base) + band * measure(right))
            if not wrong <= allowed:
                raise WrongResultError(
                    f"{case.id}: {name}: {what} is wrong: {size} error {wrong:.3g}, allowed {allowed:.3g}; "
                    "nothing was timed"
                )


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt() if values.numel() else values.new_zeros(())


def differentiated(bench: Subject, adapter: data.Adapter, call: Callable[[Tensor], Tensor]) -> Results:
    """What `call` makes of the first input, and of the first ∂y."""
    if not bench.case.trains:
        with torch.no_grad():
            return {"y": call(bench.inputs[0])}
    x = bench.inputs[0].detach().requires_grad_()
    y = call(x)
    wanted = dict(zip(("∂x", "∂lora_A", "∂lora_B", "∂gate"), (x, *adapter.trainable()), strict=False))
    gradients = torch.autograd.grad(y, list(wanted.values()), bench.grads[0])
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def fused(bench: Subject, adapter: data.Adapter, dropout: float, impl: str) -> Results:
    """`lora_linear` by `impl`."""
    own = adapter.copy(bench.case.trains)
    return differentiated(bench, own, bench.fused(own, dropout, impl, SEED if dropout else None))


def plain(bench: Subject, adapter: data.Adapter, dropout: float) -> Results:
    """`F.linear` three times and autograd, in the case's dtypes."""
    own = adapter.copy(bench.case.trains)
    device = bench.weight.device
    state = torch.full((adapter.lora_A.shape[0],), 2, device=device) if adapter.plan is None else adapter.plan.state
    live = state.nonzero().squeeze(1)
    active = (state[live] == 2).to(bench.dtype)
    factor = None
    if dropout:
        rows, columns = bench.inputs[0].shape
        factor = reference.dropout_factor(torch.tensor(SEED, device=device), dropout, rows, columns).to(bench.dtype)

    def call(x: Tensor) -> Tensor:
        shrink = F.linear(x if factor is None else x * factor, own.lora_A[live].to(x.dtype))
        if own.gate is not None:
            # The value 0 with the gradient of the gate where a rank is not ACTIVE: what is subtracted is a constant.
            gates = own.gate[live].to(x.dtype)
            shrink = shrink * (gates - (gates * (1 - active)).detach())
        return bench.frozen(x) + F.linear(shrink, own.lora_B[:, live].to(x.dtype)) * data.SCALING

    return differentiated(bench, own, call)


def _oracle(bench: LayerBench, adapter: data.Adapter, dropout: float) -> Results:
    """`reference.py` in float64."""
    weight = bench.weight.double()
    bias = None if bench.bias is None else bench.bias.double()
    seed = torch.tensor(SEED) if dropout else None
    call = adapter.double().call_of(bench.inputs[0].double(), weight, bias, dropout, seed).forward(weight, True)
    y, shrink = reference.lora_linear_forward(call)
    if not bench.case.trains:
        return {"y": y}
    backward = call._replace(given_shrink=shrink).backward(bench.grads[0].double(), [True] * 6)
    grad_x, _, grad_A, grad_B, _, grad_gate = reference.lora_linear_backward(backward)
    named = {"y": y, "∂x": grad_x, "∂lora_A": grad_A, "∂lora_B": grad_B}
    return named if adapter.gate is None else {**named, "∂gate": grad_gate}
