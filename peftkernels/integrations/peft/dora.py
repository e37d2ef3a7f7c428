"""DoRA (arXiv 2402.09353): the frozen weight's rows keep their direction, and their length is trained.

    y = m ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b,    m_n = magnitude_n / ‖W_n + s·B_n·A‖, the norm a constant for gradients
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftkernels.functional import lora_linear
from peftkernels.integrations.peft.norms import row_norms
from peftkernels.integrations.peft.operands import Operands, check_operands
from peftkernels.integrations.peft.served import Service


def dora_linear(
    module: Any, x: Tensor, operands: Operands, name: str, shrink: Tensor | None, service: Service
) -> Tensor:
    """peft's DoRA forward of the adapter ``name``; operands: of `lora_linear` for the same layer without a magnitude.

    With dropout peft takes the magnitude's correction from the dropped input and the plain product from the input as it
    is, y = x·Wᵀ + b − x̃·Wᵀ + m ⊙ (x̃·Wᵀ + s·x̃·Aᵀ·Bᵀ) with x̃ = drop(x): two products with W, here x − x̃ and x̃.
    """
    weight, bias, dropout_p = operands["weight"], operands["bias"], operands["dropout_p"]
    given = {**operands, "bias": None, "dropout_p": 0.0, "shrink": shrink, "impl": service.impl}
    dropped = x
    if dropout_p != 0.0:
        # Nothing is drawn for a call that is refused.
        check_operands(x, operands)
        dropped = functional.dropout(x, dropout_p)
    product = lora_linear(dropped, **given)
    magnitude = module._modules["lora_magnitude_vector"]._modules[name]._parameters["weight"]
    # One row, as peft's: it makes (1, N) of an x that is (K,).
    scale = (magnitude / _norms(module, operands, name, service).to(magnitude.dtype)).view(1, -1)
    if dropout_p != 0.0:
        return (functional.linear(x - dropped, weight, bias) + product * scale).to(product.dtype)
    y = product * scale
    return (y if bias is None else y + bias).to(product.dtype)


def _norms(module: Any, operands: Operands, name: str, service: Service) -> Tensor:
    """`row_norms`, made anew in every call but inside `frozen`, and there too where gradients are recorded."""
    weight, lora_A, lora_B, scaling = (operands[key] for key in ("weight", "lora_A", "lora_B", "scaling"))
    if service.norms is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or _captured(weight):
        return row_norms(weight, lora_A, lora_B, scaling)
    base = module._modules["base_layer"]._parameters["weight"]
    return service.norms.of(name, base, weight, lora_A, lora_B, scaling)


def _captured(weight: Tensor) -> bool:
    """Return True if a CUDA graph records the pass, and will replay it when no norms are kept any more."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
