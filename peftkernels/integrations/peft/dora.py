"""DoRA (arXiv 2402.09353): the frozen weight's rows keep their direction, and their length is trained.

    y = m ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b,    m_n = magnitude_n / ‖W_n + s·B_n·A‖, the norm a constant for gradients

The norm comes from the factors without N·K numbers of a product:

    ‖W_n + s·B_n·A‖² = ‖W_n‖² + 2s·(W·Aᵀ)_n·B_n + s²·B_n·(A·Aᵀ)·B_nᵀ
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftkernels.functional import lora_linear
from peftkernels.integrations.peft.served import NORMS, Service
from peftkernels.integrations.peft.steps import steps_made

# Rows of a weight of low precision that are in float32 at a time.
_ROWS = 1024


def dora_linear(
    module: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: str,
    dropout_p: float,
    shrink: Tensor | None,
    service: Service,
) -> Tensor:
    """peft's DoRA forward of the adapter ``name``.

    With dropout peft takes the magnitude's correction from the dropped input and the plain product from the input as it
    is, y = x·Wᵀ + b − x̃·Wᵀ + m ⊙ (x̃·Wᵀ + s·x̃·Aᵀ·Bᵀ) with x̃ = drop(x): two products with W, here x − x̃ and x̃.
    """
    lora_A, lora_B = module.lora_A[name].weight, module.lora_B[name].weight
    magnitude = module.lora_magnitude_vector[name].weight
    scaling = module.scaling[name]
    scale = magnitude / _norms(weight, lora_A, lora_B, scaling, name, service).to(magnitude.dtype)
    if dropout_p == 0.0:
        product = lora_linear(x, weight, lora_A, lora_B, scaling=scaling, shrink=shrink, impl=service.impl)
        y = product * scale
        return (y if bias is None else y + bias).to(product.dtype)
    dropped = functional.dropout(x, dropout_p)
    product = lora_linear(dropped, weight, lora_A, lora_B, scaling=scaling, impl=service.impl)
    rest = functional.linear(x - dropped, weight, bias)
    return (rest + product * scale).to(product.dtype)


def _norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, name: str, service: Service) -> Tensor:
    """`row_norms`, kept from one call without gradients to the next while the factors stay what they are.

    Versions and the count of optimizer steps tell of changes, but not of all (writes through `.data`, replays of a
    captured step): calls that record gradients make norms anew and keep none, and `train` and `eval` forget them.
    """
    key, read = f"{NORMS} {name}", (weight, lora_A, lora_B)
    if torch.is_grad_enabled() or not service.keeps or torch.compiler.is_compiling() or _uncounted(read):
        service.cache.pop(key, None)
        return row_norms(weight, lora_A, lora_B, scaling)
    state = scaling, steps_made(), *((tensor.data_ptr(), tensor._version) for tensor in read)
    kept = service.cache.get(key)
    if kept is None or kept[0] != state:
        kept = service.cache[key] = (state, row_norms(weight, lora_A, lora_B, scaling))
    norms: Tensor = kept[1]
    return norms


def _uncounted(tensors: Iterable[Tensor]) -> bool:
    """Whether writes to the tensors are not counted: in inference mode, or in a pass that a CUDA graph captures."""
    return any(t.is_inference() or (t.is_cuda and torch.cuda.is_current_stream_capturing()) for t in tensors)


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W_n + s·B_n·A‖ (N,) in float32, or in float64 where the weight or the factors are."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    parts = []
    for rows, up in zip(weight.split(_ROWS), lora_B.split(_ROWS), strict=True):
        rows = rows.to(dtype)
        square = rows.square().sum(1) + 2 * scaling * ((rows @ lora_A.t()) * up).sum(1)
        parts.append(square + scaling**2 * ((up @ (lora_A @ lora_A.t())) * up).sum(1))
    # Rounding can take the square of a row that cancels below zero.
    return torch.cat(parts).clamp_min_(0).sqrt_()
