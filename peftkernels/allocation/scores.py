"""AdaLoRA's importance scores: smoothed sensitivity and uncertainty of every adapter weight, reduced to ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.allocation.protocol import FACTORS, GatedLayer


@dataclass(frozen=True)
class _Group:
    """The factors of one kind and shape, which lie one after the other in the flat buffers."""

    factor: str
    shape: tuple[int, int]
    members: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return len(self.members) * self.shape[0] * self.shape[1]

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel].view(len(self.members), *self.shape)


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
    half precision. They lie in two flat buffers with all factors of one kind and shape side by side, so that a step
    is a dozen operations whatever the number of layers.
    """

    def __init__(self, layers: Mapping[str, GatedLayer], beta1: float, beta2: float) -> None:
        self._names = list(layers)
        self._layers = list(layers.values())
        self._beta1 = beta1
        self._beta2 = beta2
        self._groups = _group_factors(self._layers)
        factors = [getattr(layer, factor) for layer in self._layers for factor in FACTORS]
        self._dtype = torch.float32
        for factor in factors:
            self._dtype = torch.promote_types(self._dtype, factor.dtype)
        self._numel = sum(factor.numel() for factor in factors)
        self._allocate(factors[0].device)

    def _allocate(self, device: torch.device) -> None:
        self._sensitivity = torch.zeros(self._numel, dtype=self._dtype, device=device)
        self._uncertainty = torch.zeros_like(self._sensitivity)
        self._rank_index = {factor: self._model_order(factor, device) for factor in FACTORS}
        # Both are written before they are read in every update; keeping them saves an allocation of their size a step.
        self._scratch = torch.empty_like(self._sensitivity)
        self._importance = torch.empty_like(self._sensitivity)

    def _model_order(self, factor: str, device: torch.device) -> Tensor:
        """Where each rank, layers in model order, is found among the ranks of `factor` in group order."""
        ranks = [layer.lora_E.shape[0] for layer in self._layers]
        grouped = [member for group in self._groups if group.factor == factor for member in group.members]
        positions: dict[int, list[int]] = {}
        start = 0
        for member in grouped:
            positions[member] = list(range(start, start + ranks[member]))
            start += ranks[member]
        index = [position for member in range(len(ranks)) for position in positions[member]]
        return torch.tensor(index, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self._sensitivity.device

    def to_(self, device: torch.device) -> None:
        """Move the averages to where the layers now are."""
        sensitivity, uncertainty = self._sensitivity, self._uncertainty
        self._allocate(device)
        self._sensitivity.copy_(sensitivity)
        self._uncertainty.copy_(uncertainty)

    @torch.no_grad()
    def update(self) -> ScoreUpdate:
        """Take in the factors and their gradients as they are now; a missing gradient counts as zero.

        Where any p·g is not finite the averages stay as they are. Raises RuntimeError, before any change, where no
        factor has a gradient.
        """
        importance, scratch = self._importance, self._scratch
        missing = []
        for group in self._groups:
            parameters = [getattr(self._layers[member], group.factor) for member in group.members]
            gradients = [parameter.grad for parameter in parameters]
            for position, gradient in enumerate(gradients):
                if gradient is None:
                    gradients[position] = torch.zeros_like(parameters[position])
                    missing.append(f"{self._names[group.members[position]]}.{group.factor}")
            torch.stack(parameters, out=group.view(scratch))
            torch.stack(gradients, out=group.view(importance))
        if len(missing) == len(self._layers) * len(FACTORS):
            raise RuntimeError(
                "the allocator found no gradient on any lora_A, lora_B or lora_E: it must run after backward() and "
                "optimizer.step(), before the gradients are cleared"
            )
        importance.mul_(scratch).abs_()
        finite = torch.isfinite(importance.amax())
        # The host reads CPU tensors for free and can leave early; elsewhere the choice is made on the device.
        on_device = None if finite.device.type == "cpu" else finite
        if on_device is not None or finite:
            self._smooth(self._sensitivity, importance, self._beta1, on_device)
            self._smooth(self._uncertainty, importance.sub_(self._sensitivity).abs_(), self._beta2, on_device)
        return ScoreUpdate(finite, tuple(sorted(missing)))

    def _smooth(self, average: Tensor, value: Tensor, beta: float, finite: Tensor | None) -> None:
        # Two products and a sum, each rounded: lerp and add with alpha would fuse them and change the last bit.
        torch.mul(value, 1 - beta, out=self._scratch)
        if finite is None:
            average.mul_(beta).add_(self._scratch)
        else:
            torch.where(finite, average.mul(beta).add_(self._scratch), average, out=average)

    @torch.no_grad()
    def rank_scores(self) -> Tensor:
        """S of every rank, (Σ r,), layers in model order."""
        scores = torch.mul(self._sensitivity, self._uncertainty, out=self._scratch)
        reduced = {}
        for factor in FACTORS:
            parts = [_reduce_to_ranks(group, scores) for group in self._groups if group.factor == factor]
            reduced[factor] = torch.cat(parts)[self._rank_index[factor]]
        return reduced["lora_E"] + (reduced["lora_A"] + reduced["lora_B"])

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
        return [
            (f"{self._names[member]}.{group.factor}", part)
            for group in self._groups
            for member, part in zip(group.members, group.view(flat).unbind(), strict=True)
        ]


def _group_factors(layers: Sequence[GatedLayer]) -> list[_Group]:
    members: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for index, layer in enumerate(layers):
        for factor in FACTORS:
            rows, columns = getattr(layer, factor).shape
            members.setdefault((factor, (rows, columns)), []).append(index)
    groups = []
    start = 0
    for (factor, shape), indices in members.items():
        groups.append(_Group(factor, shape, tuple(indices), start))
        start += groups[-1].numel
    return groups


def _reduce_to_ranks(group: _Group, scores: Tensor) -> Tensor:
    """The group's elementwise scores averaged over everything but the rank, flat."""
    stacked = group.view(scores)
    if group.factor == "lora_E":
        return stacked.reshape(-1)
    summed_dim = 1 if group.factor == "lora_B" else 2
    return stacked.mean(summed_dim).reshape(-1)
