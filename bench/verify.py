"""Results are checked before a speed is printed.

What peftkernels computes may be twice as far from float64 results (`peftkernels.reference`) as plain PyTorch in the
same dtype, plus a rounding band of (2·eps + √n·eps_sum) times the result's size, n being the number of terms that are
summed. The largest error is held to this and so is the root mean square, so that one bad column cannot hide. Peers
round elsewhere; they only have to compute the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels import reference

from . import data, lineup
from .layers import LayerBench

SEED = 20261
# Relative root mean square by which a peer's y may differ: bfloat16 rounds to 0.4 %, in several places.
MOST_PEER_DIFFERENCE = 0.02


class WrongResultError(Exception):
    """A contestant's results are not what its case asks for; the message says which and by how much."""


@dataclass(frozen=True)
class _Results:
    """y and, for a case that trains, the gradients of x, A, B and the gate."""

    named: dict[str, Tensor]


def verify(bench: LayerBench) -> None:
    """Check every contestant of a layer's case; raises WrongResultError."""
    case = bench.case
    exact, plain = _oracle(bench, bench.adapter, case.dropout), _plain(bench, bench.adapter, case.dropout)
    for name, impl in ((lineup.OURS, "auto"), (lineup.FLOOR, "eager")):
        _check(bench, name, _fused(bench, bench.adapter, case.dropout, impl), plain, exact)
    if lineup.HALF_RANK in bench.contestants:
        half = bench.adapter.half()
        found = _fused(bench, half, 0.0, "auto")
        _check(bench, lineup.HALF_RANK, found, _plain(bench, half, 0.0), _oracle(bench, half, 0.0))
    if case.dropout:
        exact, plain = _oracle(bench, bench.adapter, 0.0), _plain(bench, bench.adapter, 0.0)
        _check(bench, lineup.NO_DROPOUT, _fused(bench, bench.adapter, 0.0, "auto"), plain, exact)
        return
    y = exact.named["y"]
    for name in bench.contestants:
        if name == lineup.EAGER or name.startswith("peft "):
            with torch.no_grad():
                difference = float(_rms(bench.contestants[name].call(bench.inputs[0]).double() - y) / _rms(y))
            if not difference <= MOST_PEER_DIFFERENCE:
                raise WrongResultError(
                    f"{case.id}: {name} computes something else: y differs by {difference:.2g} of its size, "
                    f"at most {MOST_PEER_DIFFERENCE:g} is rounding; nothing was timed"
                )


def _check(bench: LayerBench, name: str, found: _Results, plain: _Results, exact: _Results) -> None:
    case = bench.case
    eps_sum = torch.finfo(torch.float32).eps
    terms = case.K + case.N + case.M + case.r
    for what, right in exact.named.items():
        value = found.named[what]
        eps = max(torch.finfo(dtype).eps for dtype in (bench.dtype, value.dtype))
        band = 2 * eps + terms**0.5 * eps_sum
        error, base = value.double() - right, plain.named[what].double() - right
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


def _differentiated(bench: LayerBench, adapter: data.Adapter, call: Callable[[Tensor], Tensor]) -> _Results:
    if not bench.case.trains:
        with torch.no_grad():
            return _Results({"y": call(bench.inputs[0])})
    x = bench.inputs[0].detach().requires_grad_()
    y = call(x)
    wanted = dict(zip(("∂x", "∂lora_A", "∂lora_B", "∂gate"), (x, *adapter.trainable()), strict=False))
    gradients = torch.autograd.grad(y, list(wanted.values()), bench.grads[0])
    return _Results({"y": y.detach(), **dict(zip(wanted, gradients, strict=True))})


def _fused(bench: LayerBench, adapter: data.Adapter, dropout: float, impl: str) -> _Results:
    own = adapter.copy(bench.case.trains)
    return _differentiated(bench, own, bench.fused(own, dropout, impl, SEED if dropout else None))


def _plain(bench: LayerBench, adapter: data.Adapter, dropout: float) -> _Results:
    """`F.linear` three times and autograd, in the case's dtypes."""
    own = adapter.copy(bench.case.trains)
    state = torch.full((adapter.lora_A.shape[0],), 2) if adapter.plan is None else adapter.plan.state
    live = state.nonzero().squeeze(1)
    active = (state[live] == 2).to(bench.dtype)
    factor = None
    if dropout:
        rows, columns = bench.inputs[0].shape
        factor = reference.dropout_factor(torch.tensor(SEED), dropout, rows, columns).to(bench.dtype)

    def call(x: Tensor) -> Tensor:
        shrink = F.linear(x if factor is None else x * factor, own.lora_A[live].to(x.dtype))
        if own.gate is not None:
            # The value 0 with the gradient of the gate where a rank is not ACTIVE: what is subtracted is a constant.
            gates = own.gate[live].to(x.dtype)
            shrink = shrink * (gates - (gates * (1 - active)).detach())
        return bench.frozen(x) + F.linear(shrink, own.lora_B[:, live].to(x.dtype)) * data.SCALING

    return _differentiated(bench, own, call)


def _oracle(bench: LayerBench, adapter: data.Adapter, dropout: float) -> _Results:
    """`reference.py` in float64."""
    x, weight = bench.inputs[0].double(), bench.weight.double()
    lora_A, lora_B = adapter.lora_A.double(), adapter.lora_B.double()
    bias = None if bench.bias is None else bench.bias.double()
    gate = None if adapter.gate is None else adapter.gate.double()
    state = None if adapter.plan is None else adapter.plan.state
    seed = torch.tensor(SEED) if dropout else None
    y, shrink = reference.lora_linear_forward(x, weight, lora_A, lora_B, bias, gate, state, data.SCALING, dropout, seed)
    if not bench.case.trains:
        return _Results({"y": y})
    grad_x, _, grad_A, grad_B, _, grad_gate = reference.lora_linear_backward(
        bench.grads[0].double(), x, weight, lora_A, lora_B, gate, shrink, state, data.SCALING, dropout, seed
    )
    named = {"y": y, "∂x": grad_x, "∂lora_A": grad_A, "∂lora_B": grad_B}
    return _Results(named if gate is None else {**named, "∂gate": grad_gate})
