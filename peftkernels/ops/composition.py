"""`lora_linear` as plain operations of torch, each of which torch can differentiate, batch and push tangents through.

For what kernels do not follow: derivatives of derivatives, forward-mode differentiation and the transforms of
torch.func. Products with W are in x's dtype, the adapter's in the wider of x's and the factors', at least float32.

    X = drop(x)   S = X·Aᵀ   H = G·B   y = x·Wᵀ + bias + scaling·(S ⊙ ĝ)·Bᵀ,   ĝ_i = gate_i if ACTIVE, else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.ops.rank_plan import RankState
from peftkernels.ops.reference import dropout_factor


class Constants(NamedTuple):
    """What a call is not differentiated by: rank states uint8 (r,), scaling, probability and seed of its dropout."""

    state: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    dropout_seed: Tensor | None


class _Adapter:
    """Factors and gates in the adapter's dtype; DEAD ranks are zero, and nothing of theirs gets through."""

    def __init__(self, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, gate: Tensor | None, at: Constants) -> None:
        self.dtype = torch.promote_types(torch.promote_types(dtype, lora_A.dtype), torch.float32)
        self.at = at
        self.A, self.B = lora_A.to(self.dtype), lora_B.to(self.dtype)
        self.gates = self.A.new_ones(lora_A.shape[0]) if gate is None else gate.reshape(-1).to(self.dtype)
        self.live: Tensor | None = None
        self.active: Tensor | None = None
        if at.state is not None:
            # As int: torch.compile folds the comparison of a tensor with an enumeration's member to False.
            self.live, self.active = at.state != int(RankState.DEAD), at.state == int(RankState.ACTIVE)
            self.A, self.B = self.A.where(self.live.unsqueeze(1), 0), self.B.where(self.live, 0)

    def dropped(self, rows: Tensor) -> Tensor:
        """drop(rows), rows (M, K) in the adapter's dtype."""
        rows = rows.to(self.dtype)
        if self.at.dropout_seed is None:
            return rows
        factor = dropout_factor(self.at.dropout_seed, self.at.dropout_p, rows.shape[0], rows.shape[1])
        return rows * factor.to(self.dtype)

    def gated(self, values: Tensor) -> Tensor:
        """scaling · (values ⊙ ĝ), values (M, r)."""
        gated = values * self.gates * self.at.scaling
        return gated if self.active is None else gated.where(self.active, 0)

    def only_live(self, values: Tensor) -> Tensor:
        return values if self.live is None else values.where(self.live, 0)


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, gate: Tensor | None, at: Constants
) -> Tensor:
    """y (..., N) in x's dtype, of arguments as `lora_linear` has checked them.

    A PROBE rank's gate has the value 0 and the gradient of a gate, as AdaLoRA masks; its factors must be finite.
    """
    with without_autocast(x.device.type):
        return _forward(x, weight, lora_A, lora_B, bias, gate, at)


def _forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, gate: Tensor | None, at: Constants
) -> Tensor:
    dtype = x.dtype
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    adapter = _Adapter(dtype, lora_A, lora_B, gate, at)
    shrink = adapter.dropped(rows) @ adapter.A.T
    if adapter.active is not None:
        # What is subtracted is a constant.
        masked = adapter.gates.detach().where(~adapter.active, 0)
        adapter.gates = adapter.only_live(adapter.gates - masked)
    delta = (shrink * adapter.gates * at.scaling) @ adapter.B.T
    y = rows @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return (y + delta).to(dtype).reshape(*x.shape[:-1], weight.shape[0])


def gradients(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shrink: Tensor | None,
    at: Constants,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """∂x, ∂W, ∂A, ∂B, ∂bias and ∂gate, of which ``needs`` says which are asked for, as functions of all arguments.

    S is x·Aᵀ where x is there, else ``shrink`` (M, r), a constant. Formulas: `reference.lora_linear_backward`.
    """
    dtype = grad_y.dtype
    needs_x, needs_weight, needs_A, needs_B, needs_bias, needs_gate = needs
    grads = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
    rows = None if x is None else x.reshape(grads.shape[0], x.shape[-1])
    adapter = _Adapter(dtype, lora_A, lora_B, gate, at)
    wide = grads.to(adapter.dtype)
    expanded = wide @ adapter.B
    found: list[Tensor | None] = [None] * 6
    if needs_x:
        delta = adapter.dropped(adapter.gated(expanded) @ adapter.A)
        found[0] = (grads @ weight.to(dtype) + delta).to(dtype).reshape(*grad_y.shape[:-1], weight.shape[1])
    if needs_weight:
        assert rows is not None
        found[1] = (grads.T @ rows).to(weight.dtype)
    if needs_A:
        assert rows is not None
        found[2] = (adapter.gated(expanded).T @ adapter.dropped(rows)).to(lora_A.dtype)
    if needs_B or needs_gate:
        if rows is not None:
            shrink = adapter.dropped(rows) @ adapter.A.T
        assert shrink is not None
        shrink = adapter.only_live(shrink.to(adapter.dtype))
        if needs_B:
            found[3] = (wide.T @ adapter.gated(shrink)).to(lora_B.dtype)
        if needs_gate:
            assert gate is not None
            found[5] = adapter.only_live((shrink * expanded).sum(0) * at.scaling).to(gate.dtype).reshape(gate.shape)
    if needs_bias:
        assert bias is not None
        found[4] = wide.sum(0).to(bias.dtype)
    return found


def second_derivatives(
    grads: Sequence[Tensor | None],
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shrink: Tensor | None,
    at: tuple[Tensor | None, float | Tensor, float, Tensor | None],
    needs: Sequence[bool],
    asked: Sequence[bool],
    x_left_out: bool,
) -> list[Tensor | None]:
    """Derivatives by grad_y, x, weight, lora_A, lora_B and gate of what `gradients` gives, weighted with ``grads``.

    at     the `Constants`
    needs  which of the six gradients there are
    asked  by which of the six arguments they are differentiated
    x_left_out  whether x requires grad and was not saved

    Under enabled gradients the results can be differentiated again. Raises RuntimeError where they depend on an x that
    was left out.
    """
    if x_left_out and any(grads[place] is not None for place in (3, 5)):
        raise RuntimeError(
            "lora_linear: a second derivative by x needs x, which is not saved while lora_A is frozen: let lora_A "
            "require grad where gradients are differentiated again"
        )
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad_y.device.type):
        arguments = [grad_y, x, weight, lora_A, lora_B, gate]
        # Views, so that a tensor that stands in two places is differentiated in each.
        inputs = [
            None
            if value is None
            else value.view_as(value)
            if again and value.requires_grad
            else value.detach().requires_grad_(wanted)
            for value, wanted in zip(arguments, asked, strict=True)
        ]
        grad_y_, x_, weight_, lora_A_, lora_B_, gate_ = inputs
        assert grad_y_ is not None and weight_ is not None and lora_A_ is not None and lora_B_ is not None
        found = gradients(grad_y_, x_, weight_, lora_A_, lora_B_, bias, gate_, shrink, Constants(*at), needs)
        pairs = [
            (value, weight)
            for value, weight in zip(found, grads, strict=True)
            if value is not None and weight is not None and value.requires_grad
        ]
        wanted = [value for value, is_asked in zip(inputs, asked, strict=True) if value is not None and is_asked]
        if not pairs or not wanted:
            return [None] * 6
        results = iter(
            torch.autograd.grad(
                [value for value, _ in pairs],
                wanted,
                [weight for _, weight in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [
        next(results) if value is not None and is_asked else None for value, is_asked in zip(inputs, asked, strict=True)
    ]


class Gradients(torch.autograd.Function):
    """Gradients that are there, as functions of what they depend on: for those who differentiate them again."""

    @staticmethod
    def forward(
        ctx: Any,
        at: Constants,
        needs: Sequence[bool],
        x_left_out: bool,
        shrink: Tensor | None,
        bias: Tensor | None,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        *gradients: Tensor | None,
    ) -> Any:
        ctx.save_for_backward(grad_y, x, weight, lora_A, lora_B, gate, shrink, bias)
        ctx.at, ctx.needs, ctx.x_left_out = at, needs, x_left_out
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_y, x, weight, lora_A, lora_B, gate, shrink, bias = ctx.saved_tensors
        asked = ctx.needs_input_grad[5:11]
        found = second_derivatives(
            grads, grad_y, x, weight, lora_A, lora_B, bias, gate, shrink, ctx.at, ctx.needs, asked, ctx.x_left_out
        )
        return None, None, None, None, None, *found, *(None for _ in grads)
