"""Layers, averages and gradients that the allocation kernels are called with, and a count of their launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from peftkernels.backends.triton.common import launch
from peftkernels.ops.factor_layout import FactorLayout

BETA1, BETA2 = 0.85, 0.8
# (r, K, N) of every layer. Ranks and widths that tiles end inside of, and some that come four at a time.
LAYERS: dict[str, list[tuple[int, int, int]]] = {
    "r12": [(12, 520, 136), (12, 64, 20)],
    "odd": [(1, 7, 9), (33, 65, 31), (5, 515, 1)],
    "r0_and_r40": [(0, 6, 5), (40, 12, 20)],
}
in_every_layout = pytest.mark.parametrize("layers", LAYERS)
in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@dataclass
class Averages:
    """A layout with factors, and averages as some steps leave them; every draw is another."""

    layout: FactorLayout
    parameters: list[Tensor]
    sensitivity: Tensor
    uncertainty: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, layers: str, dtypes: Sequence[torch.dtype], device: torch.device, seed: int) -> Averages:
        layout = FactorLayout.of(LAYERS[layers])
        generator = torch.Generator().manual_seed(seed)
        shaped = enumerate(layout.shapes)
        parameters = [torch.randn(shape, generator=generator).to(device, dtypes[i % 3]) for i, shape in shaped]
        averages = [torch.zeros(layout.numel, device=device) for _ in range(2)]
        for average in averages:
            for view in layout.views(average):
                view.copy_(torch.rand(view.shape, generator=generator) * 1e-3)
        return cls(layout, parameters, *averages, generator)

    def gradients(self) -> list[Tensor | None]:
        return [torch.randn(p.shape, generator=self.generator).to(p) * 1e-2 for p in self.parameters]

    def copies(self) -> tuple[Tensor, Tensor]:
        return self.sensitivity.clone(), self.uncertainty.clone()


def averages_of(layers: str, device: torch.device, seed: int, *dtypes: torch.dtype) -> Averages:
    return Averages.drawn(layers, dtypes or (torch.float32,) * 3, device, seed)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


class counted:
    """In the block, which kernels are launched, by name; full: with what sets a form apart."""

    def __init__(self, full: bool = False) -> None:
        self._full = full

    def __enter__(self) -> list[str]:
        names: list[str] = []
        call = self._call = launch.Variant.__call__
        full = self._full

        def spy(variant: launch.Variant, programs: int, *arguments: object) -> None:
            names.append(variant.name if full else variant.function.__name__)
            call(variant, programs, *arguments)

        launch.Variant.__call__ = spy  # type: ignore[method-assign]
        return names

    def __exit__(self, *_: object) -> None:
        launch.Variant.__call__ = self._call  # type: ignore[method-assign]
