"""The orthogonality term of a run: AdaLoRA's, over the layers and ranks that still train."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels.allocation.run.orthogonality import add_orthogonality_gradient, orthogonality
from peftkernels.allocation.run.parts import RunParts


def term_of(parts: RunParts) -> Tensor:
    """Return the term, 0-dim, as a function of the factors that can be differentiated once."""
    weight, layers = parts.settings.orth_reg_weight, parts.layers
    if weight == 0:
        return torch.zeros((), device=parts.masks.device)
    lora_A, lora_B = layers.differentiable("lora_A"), layers.differentiable("lora_B")
    return orthogonality(lora_A, lora_B, weight, parts.living(), parts.current_kernels())


def add_term_gradient(parts: RunParts, scale: float) -> Tensor:
    """Add `scale` times the term's gradient to the factors' `.grad`; returns the term, 0-dim."""
    weight, layers = parts.settings.orth_reg_weight, parts.layers
    if weight == 0:
        return torch.zeros((), device=parts.masks.device)
    layers.forget()
    lora_A, lora_B = layers.factors("lora_A"), layers.factors("lora_B")
    term = add_orthogonality_gradient(lora_A, lora_B, weight, parts.living(), scale, parts.current_kernels())
    layers.store_gradients("lora_A", "lora_B")
    layers.forget()
    return term
