"""Layers that are a `forward` and nothing else, as Hugging Face's `kernels` lends them to layers that hold the state.

`kernels.kernelize` puts such a forward on an existing layer, whose parameters, submodules and class stay. None of these
classes can be used by itself. Members other than `forward` are those that `kernels` allows.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from peftkernels import nn as own
from peftkernels._tracing import constant_when_traced

__all__ = ["AdaLoRALinear", "LoRALinear", "PeftLinear"]


class LoRALinear(nn.Module):
    """For `peftkernels.nn.LoRALinear`: y = x·Wᵀ + bias + (lora_alpha/r) · drop(x)·Aᵀ·Bᵀ."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N), both in the base weight's dtype; see `lora_linear`."""
        return own.LoRALinear.forward(self, x)  # type: ignore[arg-type]


class AdaLoRALinear(nn.Module):
    """For `peftkernels.nn.AdaLoRALinear`: y = x·Wᵀ + bias + s · ((drop(x)·Aᵀ) ⊙ ĝ)·Bᵀ, ĝ the gates of ACTIVE ranks."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N), both in the base weight's dtype; see `lora_linear`."""
        return own.AdaLoRALinear.forward(self, x)  # type: ignore[arg-type]


class PeftLinear(nn.Module):
    """For HF peft's `peft.tuners.lora.layer.Linear` and `peft.tuners.adalora.layer.SVDLinear`.

    Plain LoRA, DoRA and AdaLoRA, with what `peftkernels.apply_to_peft` serves; a call that cannot be served, and a
    layer of another class, runs the forward of the layer's own class. Calls are not counted.
    """

    can_torch_compile = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) of x (..., K), as peft's own forward.

        Raises:
            RuntimeError: the installed peft is one that this version was not made for, and computes otherwise.
        """
        _check_peft()
        # peft is there where a layer of it is called, and nobody else needs it.
        from peftkernels.integrations.peft import stateless

        return stateless.forward(self, x, args, kwargs)


@functools.cache
def _checked_peft() -> bool:
    from peftkernels.integrations.peft.versions import check_version

    check_version()
    return True


@constant_when_traced
def _check_peft() -> bool:
    return _checked_peft()
