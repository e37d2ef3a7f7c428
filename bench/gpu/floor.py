"""The floor that kernels must beat: the library's products and one in-place `addmm_`, with nothing around them.

    y = x·Wᵀ + bias      S = drop(x)·Aᵀ      y += scaling · (S ⊙ ĝ)·Bᵀ

It is written as a careful user would: masks and gates are multiplied in, dropout is the library's, whose mask is kept
for the backward pass, and no argument is checked. `impl="eager"` computes the same with the package's own random
numbers and checks, and may cost more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LibraryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        active: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        factor_A, factor_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dropped, kept = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        gates = None
        if gate is not None:
            gates = (gate if active is None else gate * active).to(x.dtype)
        shrink = torch.mm(dropped, factor_A.t())
        y = F.linear(x, weight, bias)
        y.addmm_(shrink if gates is None else shrink * gates, factor_B.t(), alpha=scaling)
        ctx.save_for_backward(dropped, kept, weight, factor_A, factor_B, gate, gates, shrink)
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dropped, kept, weight, factor_A, factor_B, gate, gates, shrink = ctx.saved_tensors
        expanded = torch.mm(grad, factor_B)
        gated = expanded if gates is None else expanded * gates
        grad_x = torch.mm(grad, weight)
        if kept is None:
            grad_x.addmm_(gated, factor_A, alpha=ctx.scaling)
        else:
            share = torch.mm(gated, factor_A).mul_(kept)
            grad_x.add_(share, alpha=ctx.scaling / (1 - ctx.dropout))
        grad_A = torch.mm(gated.t(), dropped).mul_(ctx.scaling)
        grad_B = torch.mm(grad.t(), shrink if gates is None else shrink * gates).mul_(ctx.scaling)
        grad_gate = None
        if gate is not None:
            grad_gate = (shrink * expanded).sum(0, dtype=torch.float32).mul_(ctx.scaling).to(gate.dtype)
        dtype_A, dtype_B = ctx.dtypes
        return grad_x, None, grad_A.to(dtype_A), grad_B.to(dtype_B), None, grad_gate, None, None, None


def library_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    active: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """The layer's y (M, N), differentiable by x, lora_A, lora_B and gate.

    Args:
        x: (M, K), in the dtype of computation, as are weight (N, K) and bias (N,).
        lora_A, lora_B: (r, K) and (N, r), cast to x's dtype.
        gate: (r,), and `active` (r,) 1 for ACTIVE ranks and 0 for others. All ranks are multiplied; the gate's gradient
            is that of PROBE ranks wherever one is not ACTIVE.
        scaling, dropout: as of `lora_linear`.
    """
    y: Tensor = _LibraryLinear.apply(x, weight, lora_A, lora_B, bias, gate, active, scaling, dropout)
    return y
