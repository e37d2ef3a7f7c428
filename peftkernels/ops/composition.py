"""`lora_linear` as plain operations of torch, each of which torch can differentiate, batch and push tangents through.

For what kernels do not follow: derivatives of derivatives, forward-mode differentiation and the transforms of
torch.func. Products with W are in x's dtype, the adapter's in the wider of x's and the factors', at least float32.

    X = drop(x)   S = X·Aᵀ   H = G·B   y = x·Wᵀ + bias + scaling·(S ⊙ ĝ)·Bᵀ,   ĝ_i = gate_i if ACTIVE, else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.ops.call import Adapter, Backward, Forward, Needs
from peftkernels.ops.rank_plan import RankState
from peftkernels.ops.reference import dropout_factor
from peftkernels.ops.rules import rank_dtype

# What it serves of the arguments that not every backend does: `Call.later_arguments`.
SERVES: frozenset[str] = frozenset()


class _Factors:
    """Factors and gates in the adapter's dtype; DEAD ranks are zero, and nothing of theirs gets through."""

    def __init__(self, dtype: torch.dtype, adapter: Adapter) -> None:
        lora_A, gate, state = adapter.lora_A, adapter.gate, adapter.rank_state
        self.dtype = torch.promote_types(torch.promote_types(dtype, lora_A.dtype), torch.float32)
        self.adapter = adapter
        self.A, self.B = lora_A.to(self.dtype), adapter.lora_B.to(self.dtype)
        self.gates = self.A.new_ones(lora_A.shape[0]) if gate is None else gate.reshape(-1).to(self.dtype)
        self.live: Tensor | None = None
        self.active: Tensor | None = None
        if state is not None:
            # As int: torch.compile folds the comparison of a tensor with an enumeration's member to False.
            self.live, self.active = state != int(RankState.DEAD), state == int(RankState.ACTIVE)
            self.A, self.B = self.A.where(self.live.unsqueeze(1), 0), self.B.where(self.live, 0)

    def dropped(self, rows: Tensor) -> Tensor:
        """drop(rows), rows (M, K) in the adapter's dtype."""
        rows = rows.to(self.dtype)
        seed = self.adapter.dropout_seed
        if seed is None:
            return rows
        assert isinstance(seed, Tensor)
        factor = dropout_factor(seed, self.adapter.dropout_p, rows.shape[0], rows.shape[1])
        return rows * factor.to(self.dtype)

    def gated(self, values: Tensor) -> Tensor:
        """scaling · (values ⊙ ĝ), values (M, r)."""
        gated = values * self.gates * self.adapter.scale
        return gated if self.active is None else gated.where(self.active, 0)

    def only_live(self, values: Tensor) -> Tensor:
        return values if self.live is None else values.where(self.live, 0)


def forward(call: Forward) -> tuple[Tensor, Tensor]:
    """y (..., N) in x's dtype, and S (M, r). One that is given is not looked at: it carries no derivatives.

    A PROBE rank's gate has the value 0 and the gradient of a gate, as AdaLoRA masks; its factors must be finite.
    """
    with without_autocast(call.x.device.type):
        return _forward(call)


def _forward(call: Forward) -> tuple[Tensor, Tensor]:
    x, weight, bias = call.x, call.weight, call.bias
    dtype = x.dtype
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    factors = _Factors(dtype, call.adapter)
    shrink = factors.dropped(rows) @ factors.A.T
    if factors.active is not None:
        # What is subtracted is a constant.
        masked = factors.gates.detach().where(~factors.active, 0)
        factors.gates = factors.only_live(factors.gates - masked)
    delta = (shrink * factors.gates * call.adapter.scale) @ factors.B.T
    y = rows @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return (y + delta).to(dtype).reshape(*x.shape[:-1], weight.shape[0]), shrink.to(rank_dtype(dtype))


def gradients(call: Backward) -> list[Tensor | None]:
    """The gradients that `needs` asks for, the others None, as functions of all arguments.

    S is x·Aᵀ where x is there, else ``shrink`` (M, r), a constant. Formulas: `reference.lora_linear_backward`.
    """
    grad_y, x, weight, bias, shrink = call.grad_y, call.x, call.weight, call.bias, call.shrink
    lora_A, lora_B, gate = call.lora_A, call.lora_B, call.gate
    dtype = grad_y.dtype
    needs = Needs(*call.needs)
    grads = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
    rows = None if x is None else x.reshape(grads.shape[0], x.shape[-1])
    factors = _Factors(dtype, call.adapter)
    wide = grads.to(factors.dtype)
    expanded = wide @ factors.B
    found: list[Tensor | None] = [None] * 6
    if needs.x:
        delta = factors.dropped(factors.gated(expanded) @ factors.A)
        found[0] = (grads @ weight.to(dtype) + delta).to(dtype).reshape(*grad_y.shape[:-1], weight.shape[1])
    if needs.weight:
        assert rows is not None
        found[1] = (grads.T @ rows).to(weight.dtype)
    if needs.lora_A:
        assert rows is not None
        found[2] = (factors.gated(expanded).T @ factors.dropped(rows)).to(lora_A.dtype)
    if needs.lora_B or needs.gate:
        if rows is not None:
            shrink = factors.dropped(rows) @ factors.A.T
        assert shrink is not None
        shrink = factors.only_live(shrink.to(factors.dtype))
        if needs.lora_B:
            found[3] = (wide.T @ factors.gated(shrink)).to(lora_B.dtype)
        if needs.gate:
            assert gate is not None
            sums = (shrink * expanded).sum(0) * call.adapter.scale
            found[5] = factors.only_live(sums).to(gate.dtype).reshape(gate.shape)
    if needs.bias:
        assert bias is not None
        found[4] = wide.sum(0).to(bias.dtype)
    return found


# The arguments of the backward operator that its gradients are differentiated by.
_VARIABLES = ("grad_y", "x", "weight", "lora_A", "lora_B", "gate")


def second_derivatives(
    grads: Sequence[Tensor | None], arguments: Sequence[Any], asked: Sequence[bool], x_left_out: bool
) -> list[Tensor | None]:
    """Derivatives by grad_y, x, weight, lora_A, lora_B and gate of what `gradients` gives, weighted with ``grads``.

    Under enabled gradients the results can be differentiated again.

    Args:
        grads: weights of the six gradients.
        arguments: those of the backward operator, in the order of `Backward`.
        asked: by which of the six arguments they are differentiated.
        x_left_out: whether x requires grad and was not saved.

    Raises:
        RuntimeError: the derivatives depend on an x that was left out.
    """
    if x_left_out and any(grads[place] is not None for place in (3, 5)):
        raise RuntimeError(
            "lora_linear: a second derivative by x needs x, which is not saved while lora_A is frozen: let lora_A "
            "require grad where gradients are differentiated again"
        )
    call = Backward(*arguments)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(call.grad_y.device.type):
        # Views, so that a tensor that stands in two places is differentiated in each.
        inputs: dict[str, Tensor | None] = {
            name: None
            if value is None
            else value.view_as(value)
            if again and value.requires_grad
            else value.detach().requires_grad_(wanted)
            for name, wanted in zip(_VARIABLES, asked, strict=True)
            for value in (getattr(call, name),)
        }
        found = gradients(Backward(**{**call._asdict(), **inputs}))
        pairs = [
            (value, weight)
            for value, weight in zip(found, grads, strict=True)
            if value is not None and weight is not None and value.requires_grad
        ]
        named = list(zip(inputs.values(), asked, strict=True))
        wanted = [value for value, is_asked in named if value is not None and is_asked]
        if not pairs or not wanted:
            return [None] * len(named)
        results = iter(
            torch.autograd.grad(
                [value for value, _ in pairs],
                wanted,
                [weight for _, weight in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [next(results) if value is not None and is_asked else None for value, is_asked in named]


class Gradients(torch.autograd.Function):
    """Gradients that are there, as functions of what they depend on: for those who differentiate them again.

    Its arguments are `x_left_out` of `second_derivatives`, those of the backward operator, and the six gradients.
    """

    @staticmethod
    def forward(ctx: Any, x_left_out: bool, *arguments: Any) -> Any:
        call, gradients = Backward(*arguments[: -len(Needs._fields)]), arguments[-len(Needs._fields) :]
        ctx.places = [place for place, value in enumerate(call) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(call[place] for place in ctx.places))
        ctx.others = [None if isinstance(value, Tensor) else value for value in call]
        ctx.x_left_out = x_left_out
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        arguments = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor
        places = [Backward._fields.index(name) for name in _VARIABLES]
        asked = [ctx.needs_input_grad[1 + place] for place in places]
        found = dict(zip(places, second_derivatives(grads, arguments, asked, ctx.x_left_out), strict=True))
        return None, *(found.get(place) for place in range(len(arguments))), *(None for _ in grads)
