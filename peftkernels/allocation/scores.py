"""AdaLoRA's importance scores: smoothed sensitivity and uncertainty of every adapter weight, reduced to ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.allocation.kernels import FactorLayout, kernels_for
from peftkernels.allocation.protocol import FACTORS, GatedLayer


@dataclass(frozen=True)
class ScoreUpdate:
    """finite: 0-dim bool on the averages' device, whether the update was taken; missing: factors without gradient."""

    finite: Tensor
    missing: tuple[str, ...]


class ScoreAverages:
    """The running averages behind AdaLoRA's scores (arXiv 2303.10512, eq. 8 to 11, with HF peft's order of updates).

    For every adapter weight p with gradient g, all elementwise and each operation rounded on its own:

        I = |p·g|    Ī ← β1·Ī + (1-β1)·I    Ū ← β2·Ū + (1-β2)·|I - Ī|    s = Ī·Ū    (zero start, no bias correction)
        S_i = s_E,i + (mean_j s_A,ij + mean_j s_B,ji)

    The averages are float32, or float64 where a factor is float64: products of small numbers that would underflow in
    half precision. They lie in two flat buffers, one factor after the other as `FactorLayout` says. impl: which kernels
    compute them, see `kernels_for`; `kernels` are the chosen ones.
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
        self.kernels = kernels_for(device, self._dtype, self._impl)
        self._sensitivity = torch.zeros(self._layout.numel, dtype=self._dtype, device=device)
        self._uncertainty = torch.zeros_like(self._sensitivity)

    def _factors(self) -> list[Tensor]:
        return [_parameter(layer, factor) for layer in self._layers for factor in FACTORS]

    @property
    def device(self) -> torch.device:
        return self._sensitivity.device

    def to_(self, device: torch.device) -> None:
        """Move the averages to where the layers now are."""
        sensitivity, uncertainty = self._sensitivity, self._uncertainty
        self._allocate(device)
        self._sensitivity.copy_(sensitivity)
        self._uncertainty.copy_(uncertainty)

    def update(self) -> ScoreUpdate:
        """Take in the factors and their gradients as they are now; a missing gradient counts as zero.

        Where any p·g is not finite the averages stay as they are. Raises RuntimeError, before any change, where no
        factor has a gradient.
        """
        parameters = self._factors()
        gradients = [parameter.grad for parameter in parameters]
        missing = [name for name, gradient in zip(self._names, gradients, strict=True) if gradient is None]
        if len(missing) == len(parameters):
            raise RuntimeError(
                "the allocator found no gradient on any lora_A, lora_B or lora_E: it must run after backward() and "
                "optimizer.step(), before the gradients are cleared"
            )
        finite = self.kernels.update_averages(
            self._layout, parameters, gradients, self._sensitivity, self._uncertainty, self._beta1, self._beta2
        )
        return ScoreUpdate(finite, tuple(sorted(missing)))

    def rank_scores(self) -> Tensor:
        """S of every rank, (Σ r,), layers in model order."""
        return self.kernels.rank_scores(self._layout, self._sensitivity, self._uncertainty)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies of Ī and Ū by "<layer>.<factor>", each in the factor's shape."""
        return {
            "sensitivity": {name: part.clone() for name, part in self._by_name(self._sensitivity)},
            "uncertainty": {name: part.clone() for name, part in self._by_name(self._uncertainty)},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, before any change, for missing or misshapen tensors."""
        targets = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        for average, flat in targets.items():
            for name, part in self._by_name(flat):
                found = state[average].get(name)
                if found is None or found.shape != part.shape or found.dtype != part.dtype:
                    described = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                    raise ValueError(
                        f"state[{average!r}][{name!r}]: found {described}, expected {tuple(part.shape)} {part.dtype}"
                    )
        for average, flat in targets.items():
            for name, part in self._by_name(flat):
                part.copy_(state[average][name])

    def _by_name(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        return list(zip(self._names, self._layout.views(flat), strict=True))


def _parameter(layer: GatedLayer, name: str) -> Tensor:
    """What `getattr` gives; a module looks for its parameters in one dictionary after the other, for far longer."""
    own = getattr(layer, "_parameters", {}).get(name)
    return getattr(layer, name) if own is None else own
