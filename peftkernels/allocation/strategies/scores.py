"""AdaLoRA's importance scores: smoothed sensitivity and uncertainty of every adapter weight, reduced to ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.allocation.layers.gated import FACTORS, GatedLayer, factors_of
from peftkernels.backends.registry import kernels_for
from peftkernels.ops.factor_layout import FactorLayout


@dataclass(frozen=True)
class ScoreUpdate:
    """What came of an update.

    Attributes:
        finite: 0-dim bool on the averages' device, True if the update was taken.
        missing: Factors without a gradient.
    """

    finite: Tensor
    missing: tuple[str, ...]


class ScoreAverages:
    """The running averages behind AdaLoRA's scores (arXiv 2303.10512, eq. 8 to 11, with HF peft's order of updates).

    For every adapter weight p with gradient g, all elementwise and each operation rounded on its own:

        I = |p·g|    Ī ← β1·Ī + (1-β1)·I    Ū ← β2·Ū + (1-β2)·|I - Ī|    s = Ī·Ū    (zero start, no bias correction)
        S_i = s_E,i + (mean_j s_A,ij + mean_j s_B,ji)

    The averages are float32, or float64 where a factor is float64: products of small numbers that would underflow in
    half precision. They lie in two flat buffers, one factor after the other as `FactorLayout` says.

    Args:
        layers: The layers by name.
        beta1: β1, between 0 and 1.
        beta2: β2, between 0 and 1.
        impl: Which kernels compute them, see `kernels_for`.
    """

    def __init__(self, layers: Mapping[str, GatedLayer], beta1: float, beta2: float, impl: str = "auto") -> None:
        self._layers = list(layers.values())
        self._names = [f"{name}.{factor}" for name in layers for factor in FACTORS]
        self._beta1 = beta1
        self._beta2 = beta2
        self._impl = impl
        self._layout = FactorLayout.of(
            [(layer.lora_A.shape[0], layer.lora_A.shape[1], layer.lora_B.shape[0]) for layer in self._layers]
        )
        factors = self._factors()
        self._dtype = torch.float32
        for factor in factors:
            self._dtype = torch.promote_types(self._dtype, factor.dtype)
        self._allocate(factors[0].device)

    def _allocate(self, device: torch.device) -> None:
        self._kernels = kernels_for(device, self._dtype, self._impl)
        self._sensitivity = torch.zeros(self._layout.numel, dtype=self._dtype, device=device)
        self._uncertainty = torch.zeros_like(self._sensitivity)

    def _factors(self) -> list[Tensor]:
        return factors_of(self._layers, *FACTORS)

    def update(self, skip: Tensor | None = None) -> ScoreUpdate:
        """Take in the factors and their gradients as they are now; a missing gradient counts as zero.

        Where any p·g is not finite, and where skip (0-dim bool) holds, the averages stay as they are.
        """
        parameters = self._factors()
        gradients = [parameter.grad for parameter in parameters]
        missing = [name for name, gradient in zip(self._names, gradients, strict=True) if gradient is None]
        finite = self._kernels.update_averages(
            self._layout, parameters, gradients, self._sensitivity, self._uncertainty, self._beta1, self._beta2, skip
        )
        return ScoreUpdate(finite, tuple(sorted(missing)))

    def rank_scores(self) -> Tensor:
        """Return S of every rank, (Σ r,), layers in model order."""
        return self._kernels.rank_scores(self._layout, self._sensitivity, self._uncertainty)

    def tensors(self) -> dict[str, Tensor]:
        """Return Ī and Ū by "sensitivity.<layer>.<factor>" and "uncertainty.<layer>.<factor>".

        They are views of the averages themselves, in the factors' shapes.
        """
        averages = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        return {f"{kind}.{name}": part for kind, flat in averages.items() for name, part in self._by_name(flat)}

    def _by_name(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        return list(zip(self._names, self._layout.views(flat), strict=True))
