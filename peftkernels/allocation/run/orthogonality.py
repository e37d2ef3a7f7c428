"""AdaLoRA's orthogonality term with its closed-form gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels.backends.registry import kernels_for
from peftkernels.ops.allocation_kernels import AllocationKernels

# Arguments of the function below before the factors.
_OTHER_ARGUMENTS = 4


def orthogonality(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    keep: Sequence[Tensor] | None = None,
    impl: str | AllocationKernels = "auto",
) -> Tensor:
    """Return AdaLoRA's orthogonality term, a 0-dim tensor.

        w/(2n) · Σ over the n adapters of ‖A·Aᵀ - I‖_F + ‖Bᵀ·B - I‖_F

    The gradient is 2·M·A/‖M‖_F with M = A·Aᵀ - I, for B 2·B·M/‖M‖_F, and 0 where ‖M‖_F = 0. Sums are in the factors'
    dtype, in float32 for lower precisions, and autocast does not change that; the gradient comes in each factor's own
    dtype. Differentiating twice raises.

    Args:
        lora_A: n tensors (r, K); shapes may differ between adapters.
        lora_B: n tensors (N, r).
        weight: w.
        keep: n bool tensors (r,), or None; where given, only the rows of A and columns of B that are kept take part,
            and I is the identity on them.
        impl: Which kernels compute it, see `kernels_for`, or an object that it gave, which keeps tables and working
            memory from one call to the next.

    Source: Zhang et al., arXiv 2303.10512, eq. 4, with HF peft's norms that are not squared and its mean over the 2n
    factors.
    """
    if weight == 0:
        return torch.zeros((), device=lora_A[0].device)
    return _OrthogonalityTerm.apply(weight, keep, impl, len(lora_A), *lora_A, *lora_B)


@torch.no_grad()
def add_orthogonality_gradient(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    keep: Sequence[Tensor] | None,
    scale: float,
    kernels: AllocationKernels,
) -> Tensor:
    """Add `scale` times the gradient of `orthogonality` to the factors' `.grad`, without a graph; returns the term.

    `.grad` is created where it is None; factors that do not require a gradient are left alone.
    """
    if weight == 0:
        return torch.zeros((), device=lora_A[0].device)
    targets = []
    for factor in (*lora_A, *lora_B):
        target = factor.grad
        if not factor.requires_grad:
            # What is added to a factor that is not trained goes nowhere.
            target = torch.zeros_like(factor)
        elif target is None:
            factor.grad = target = torch.zeros_like(factor)
        targets.append(target)
    return kernels.orthogonality(lora_A, lora_B, weight, keep, targets, scale)[0]


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
    def forward(
        ctx: Any,
        weight: float,
        keep: Sequence[Tensor] | None,
        impl: str | AllocationKernels,
        n: int,
        *factors: Tensor,
    ) -> Tensor:
        if isinstance(impl, str):
            kernels = kernels_for(factors[0].device, torch.promote_types(factors[0].dtype, torch.float32), impl)
        else:
            kernels = impl
        needs = any(ctx.needs_input_grad[_OTHER_ARGUMENTS:])
        term, gradients = kernels.orthogonality(factors[:n], factors[n:], weight, keep, gradients=needs)
        ctx.save_for_backward(*(gradients or ()), *factors)
        return term

    @staticmethod
    def backward(ctx: Any, grad_term: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        gradients, factors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad[_OTHER_ARGUMENTS:]
        wanted = [gradient for gradient, need in zip(gradients, needed, strict=True) if need]
        scaled = iter(torch._foreach_mul(wanted, grad_term))
        factor_grads = [
            next(scaled).to(factor.dtype) if need else None for factor, need in zip(factors, needed, strict=True)
        ]
        others = (None,) * _OTHER_ARGUMENTS
        if torch.is_grad_enabled():
            return *others, *_NoSecondDerivative.apply(len(factors), *factors, *factor_grads)
        return *others, *factor_grads
