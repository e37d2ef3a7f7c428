"""AdaLoRA's orthogonality term with its closed-form gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def orthogonality(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    keep: Sequence[Tensor] | None = None,
) -> Tensor:
    """w/(2n) · Σ over the n adapters of ‖A·Aᵀ - I‖_F + ‖Bᵀ·B - I‖_F, a 0-dim tensor (arXiv 2303.10512, eq. 4, with HF
    peft's norms that are not squared and its mean over the 2n factors).

    lora_A: n tensors (r, K), lora_B: n tensors (N, r); shapes may differ between adapters. keep: n bool tensors (r,),
    or None; where given, only the rows of A and columns of B that are kept take part, and I is the identity on them.
    The gradient is 2·M·A/‖M‖_F with M = A·Aᵀ - I, for B 2·B·M/‖M‖_F, and 0 where ‖M‖_F = 0. Sums are in
    the factors' dtype, in float32 for lower precisions, and autocast does not change that; the gradient comes in each
    factor's own dtype. Adapters of one shape are handled together. Differentiating twice raises.
    """
    return _OrthogonalityTerm.apply(weight, keep, len(lora_A), *lora_A, *lora_B)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, as functions of the factors that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *factors_and_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = factors_and_gradients[count:]
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("orthogonality: double backward is not implemented; its gradient cannot be differentiated")


class _OrthogonalityTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: float, keep: Sequence[Tensor] | None, n: int, *factors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        share = weight / (2 * n)
        ctx.members = []
        gradients = []
        total: Tensor | None = None
        with torch.autocast(factors[0].device.type, enabled=False):
            for members in _members_by_shape(factors, n):
                is_A = members[0] < n
                stacked = torch.stack([factors[index] for index in members])
                stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
                kept = None if keep is None else torch.stack([keep[index % n] for index in members])
                norms, gradient = _term(stacked, is_A, kept, share, any(needed[index] for index in members))
                group_sum = norms.sum()
                total = group_sum if total is None else total + group_sum
                if gradient is not None:
                    ctx.members.append(members)
                    gradients.append(gradient)
        ctx.save_for_backward(*gradients, *factors)
        assert total is not None
        return total * share

    @staticmethod
    def backward(ctx: Any, grad_term: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.members)
        gradients, factors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        factor_grads: list[Tensor | None] = [None] * len(factors)
        for members, gradient in zip(ctx.members, gradients, strict=True):
            for index, part in zip(members, (gradient * grad_term).unbind(), strict=True):
                if ctx.needs_input_grad[3 + index]:
                    factor_grads[index] = part.to(factors[index].dtype)
        if torch.is_grad_enabled():
            return None, None, None, *_NoSecondDerivative.apply(len(factors), *factors, *factor_grads)
        return None, None, None, *factor_grads


def _members_by_shape(factors: Sequence[Tensor], n: int) -> list[list[int]]:
    members: dict[tuple[bool, torch.Size], list[int]] = {}
    for index, factor in enumerate(factors):
        members.setdefault((index < n, factor.shape), []).append(index)
    return list(members.values())


def _term(
    stacked: Tensor, is_A: bool, kept: Tensor | None, share: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """‖M‖_F of every factor in the stack and, where asked for, the stack's gradient times `share`."""
    if kept is not None:
        stacked = stacked * (kept.unsqueeze(2) if is_A else kept.unsqueeze(1))
    # [n, r, r], transposed for B so that both kinds read as M·factor or factor·M below
    gram = torch.bmm(stacked, stacked.mT) if is_A else torch.bmm(stacked.mT, stacked)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.sub_(1 if kept is None else kept.to(gram.dtype))
    norms = torch.linalg.vector_norm(gram, dim=(1, 2))
    if not needs_gradient:
        return norms, None
    coefficient = torch.where(norms == 0, 0.0, (2 * share) / norms)
    gram.mul_(coefficient[:, None, None])
    return norms, torch.bmm(gram, stacked) if is_A else torch.bmm(stacked, gram)
