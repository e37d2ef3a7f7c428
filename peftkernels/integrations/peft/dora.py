"""DoRA (arXiv 2402.09353): the frozen weight's rows keep their direction, and their length is trained.

y = m ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b,    m_n = magnitude_n / ‖W_n + s·B_n·A‖, the norm a constant for gradients
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftkernels.integrations.peft.norms import row_norms
from peftkernels.integrations.peft.operands import adapted_linear, check_operands, weight_and_bias
from peftkernels.integrations.peft.served import Service
from peftkernels.ops.call import Adapter


def dora_linear(module: Any, x: Tensor, adapter: Adapter, name: str, shrink: Tensor | None, service: Service) -> Tensor:
    """peft's DoRA forward of the adapter ``name``, which ``adapter`` is without its magnitude.

    With dropout peft takes the magnitude's correction from the dropped input and the plain product from the input as it
    is, y = x·Wᵀ + b − x̃·Wᵀ + m ⊙ (x̃·Wᵀ + s·x̃·Aᵀ·Bᵀ) with x̃ = drop(x): two products with W, here x − x̃ and x̃.
    """
    weight, bias = weight_and_bias(module)
    dropout_p, dropped = adapter.dropout_p, x
    if dropout_p != 0.0:
        # Nothing is drawn for a call that is refused.
        check_operands(x, weight, bias, adapter)
        dropped, adapter = functional.dropout(x, dropout_p), adapter._replace(dropout_p=0.0)
    product = adapted_linear(dropped, weight, None, adapter, shrink, service.impl)
    magnitude = module._modules["lora_magnitude_vector"]._modules[name]._parameters["weight"]
    # One row, as peft's: it makes (1, N) of an x that is (K,).
    scale = (magnitude / _norms(module, weight, adapter, name, service).to(magnitude.dtype)).view(1, -1)
    if dropout_p != 0.0:
        return (functional.linear(x - dropped, weight, bias) + product * scale).to(product.dtype)
    y = product * scale
    return (y if bias is None else y + bias).to(product.dtype)


def _norms(module: Any, weight: Tensor, adapter: Adapter, name: str, service: Service) -> Tensor:
    """`row_norms`, made anew in every call but inside `frozen`, and there too where gradients are recorded."""
    if service.norms is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or _captured(weight):
        return row_norms(weight, adapter)
    base = module._modules["base_layer"]._parameters["weight"]
    return service.norms.of(name, base, weight, adapter)


def _captured(weight: Tensor) -> bool:
    """Return True if a CUDA graph records the pass, and will replay it when no norms are kept any more."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
