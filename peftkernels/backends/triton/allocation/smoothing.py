"""Host side of the averages: tables of a layout, and which launches an update and the scores take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peftkernels.backends.triton.allocation import averages
from peftkernels.backends.triton.allocation.addresses import Addresses, Tensors, capturing
from peftkernels.backends.triton.allocation.parts import Block, Factor, factor_table, tile_table

if TYPE_CHECKING:
    from peftkernels.ops.factor_layout import FactorLayout

_KINDS = 3  # A, B, E


class _Launch(NamedTuple):
    """The factors of one pair of dtypes: their tiles, and the kernels that walk them."""

    parameter: torch.dtype
    gradient: torch.dtype
    tiles: Tensor
    programs: int


class Smoothing:
    """The averages of one layout on one device, and the sums of Ī·Ū that the last update left."""

    def __init__(self, layout: FactorLayout, device: torch.device) -> None:
        if capturing(device):
            raise RuntimeError(
                "the averages of these layers were not updated on this device yet, and their tables cannot be made "
                "while a CUDA graph is captured: make one call before the capture"
            )
        self._layout, self._device = layout, device
        self._block = averages.narrow(max(layout.ranks, default=1))
        self._factors, parts = _factors(layout, self._block)
        self._table = factor_table(self._factors, device)
        self._sums = torch.empty(parts, dtype=torch.float32, device=device)
        self._parameters = Addresses(
            "the parameters lora_A, lora_B, lora_E", partial(self._check_factors, "parameters")
        )
        self._gradients = Addresses(
            "the gradients of lora_A, lora_B, lora_E", partial(self._check_factors, "gradients")
        )
        self._dtypes: tuple[object, ...] = ()
        self._launches: tuple[_Launch, ...] = ()
        self._even = all(r % 4 == 0 for r in layout.ranks) and all(k % 4 == 0 for _, k in layout.shapes[::_KINDS])
        # Which values of which averages the sums belong to.
        self._summed: tuple[object, ...] = ()

    def serves(self, layout: FactorLayout, device: torch.device) -> bool:
        """Return True if this is what a call needs."""
        return device == self._device and (layout is self._layout or layout == self._layout)

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        sensitivity: Tensor,
        uncertainty: Tensor,
        beta1: float,
        beta2: float,
        skip: Tensor | None,
    ) -> Tensor:
        """`AllocationKernels.update_averages`."""
        self._check(sensitivity, uncertainty)
        recording = capturing(self._device)
        moved = self._parameters.update(parameters, self._device, recording)
        moved |= self._gradients.update(gradients, self._device, recording)
        if moved:
            self._group()
        even = self._even_for(sensitivity, uncertainty) and self._parameters.aligned and self._gradients.aligned
        # As int32 for the device's atomic operations; its first byte is the bool that is returned.
        finite = torch.ones(1, dtype=torch.int32, device=self._device)
        addresses = self._parameters.table, self._gradients.table
        for parameter, gradient, tiles, programs in self._launches:
            check = averages.finite_variant(parameter, gradient, self._block, even)
            check(programs, tiles, self._table, *addresses, finite)
        skipped = None if skip is None else skip.view(torch.uint8)
        rates = beta1, 1 - beta1, beta2, 1 - beta2
        for parameter, gradient, tiles, programs in self._launches:
            smooth = averages.update_variant(parameter, gradient, self._block, skip is not None, even)
            smooth(
                programs, tiles, self._table, *addresses, sensitivity, uncertainty, finite, skipped, self._sums, *rates
            )
        torch.autograd.graph.increment_version((sensitivity, uncertainty))
        self._summed = self._values(sensitivity, uncertainty, recording)
        return finite.view(torch.bool)[0]

    def scores(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """`AllocationKernels.rank_scores`: from the sums of the last update where the averages are those it left."""
        self._check(sensitivity, uncertainty)
        if self._summed != self._values(sensitivity, uncertainty, capturing(self._device)):
            tiles, programs = _tiles(self._factors, tuple(range(len(self._factors))), self._block, self._device)
            sums = averages.sums_variant(self._block, self._even_for(sensitivity, uncertainty))
            nothing = (None, None)
            sums(
                programs, tiles, self._table, *nothing, sensitivity, uncertainty, *nothing, self._sums,
                0.0, 0.0, 0.0, 0.0,
            )  # fmt: skip
        scores = torch.empty(self._layout.total_rank, dtype=torch.float32, device=self._device)
        if self._layout.ranks:
            averages.scores_variant(self._block)(len(self._layout.ranks), self._table, self._sums, scores)
        return scores

    def _values(self, sensitivity: Tensor, uncertainty: Tensor, recording: bool) -> tuple[object, ...]:
        """What is the same only where the averages hold the same values.

        Replays of a CUDA graph change them unseen, but leave their sums in the same place. What a graph itself does
        with averages that it did not update is not known while it is captured: there the sums are taken again.
        """
        places = sensitivity.data_ptr(), uncertainty.data_ptr()
        return (*places, sensitivity._version, uncertainty._version, recording)

    def _even_for(self, sensitivity: Tensor, uncertainty: Tensor) -> bool:
        """Return True if numbers of these averages come four at a time, at multiples of 16 bytes."""
        return self._even and (sensitivity.data_ptr() | uncertainty.data_ptr()) % 16 == 0

    def _check(self, sensitivity: Tensor, uncertainty: Tensor) -> None:
        expected = (self._layout.numel,)
        for name, average in (("sensitivity", sensitivity), ("uncertainty", uncertainty)):
            if average.dtype is not torch.float32 or average.shape != expected or not average.is_contiguous():
                raise ValueError(
                    f"{name}: found {average.dtype} {tuple(average.shape)}, expected contiguous torch.float32 "
                    f"{expected}"
                )

    def _check_factors(self, name: str, tensors: Tensors) -> None:
        shapes = self._layout.shapes
        if len(tensors) != len(shapes):
            raise ValueError(f"{name}: found {len(tensors)} tensors, expected {len(shapes)}")
        for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if tensor is not None and (tensor.shape != shape or tensor.dtype not in averages.ELEMENTS):
                raise ValueError(
                    f"{name}[{index}]: found {tensor.dtype} {tuple(tensor.shape)}, expected float32, float16 or "
                    f"bfloat16 {shape}"
                )

    def _group(self) -> None:
        """Put the factors together by dtype, where it is another than before."""
        dtypes = (self._parameters.dtypes, self._gradients.dtypes)
        if dtypes == self._dtypes:
            return
        alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for number, (parameter, gradient) in enumerate(zip(*dtypes, strict=True)):
            assert parameter is not None
            alike.setdefault((parameter, gradient or parameter), []).append(number)
        launches = []
        for (parameter, gradient), numbers in alike.items():
            tiles, programs = _tiles(self._factors, tuple(numbers), self._block, self._device)
            if programs:
                launches.append(_Launch(parameter, gradient, tiles, programs))
        self._launches, self._dtypes = tuple(launches), dtypes


def _factors(layout: FactorLayout, narrow: Block) -> tuple[tuple[Factor, ...], int]:
    """Every factor of the layout, and how many sums of tiles they have together."""
    found, sums = [], 0
    for number, ((rows, columns), start) in enumerate(zip(layout.shapes, layout.offsets, strict=True)):
        layer, kind = divmod(number, _KINDS)
        r = layout.ranks[layer]
        wide = kind == 0
        lines = 1 if kind == _KINDS - 1 else columns if wide else rows
        found.append(Factor(start, lines, r, int(wide), layout.rank_offsets[layer], sums))
        sums += (averages.WIDE if wide else narrow).blocks(lines, r)[0] * r
    return tuple(found), sums


@lru_cache(maxsize=8)
def _tiles(
    factors: tuple[Factor, ...], numbers: tuple[int, ...], narrow: Block, device: torch.device
) -> tuple[Tensor, int]:
    return tile_table(factors, numbers, averages.WIDE, narrow, device)
