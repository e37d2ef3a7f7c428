"""Where the factors of many layers lie in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

# Every factor begins at a multiple of this many elements, so that vectors of any width are loaded aligned.
ALIGNMENT = 16
FACTORS_PER_LAYER = 3


@dataclass(frozen=True)
class FactorLayout:
    """The factors A (r, K), B (N, r), E (r, 1) of every layer, layers in model order, one factor after the other.

    Attributes:
        ranks: r of every layer.
        shapes: Of every factor: A, B, E of the first layer, A, B, E of the second, …
        offsets: First element of every factor in a flat buffer, a multiple of `ALIGNMENT`.
        rank_offsets: First rank of every layer among all ranks.
        numel: Elements of a flat buffer; those between factors belong to no factor and stay zero.
        total_rank: Σ r.
    """

    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    rank_offsets: tuple[int, ...]
    numel: int
    total_rank: int

    @classmethod
    def of(cls, layers: Sequence[tuple[int, int, int]]) -> FactorLayout:
        """Lay out layers, given as (r, K, N)."""
        shapes = [shape for r, k, n in layers for shape in ((r, k), (n, r), (r, 1))]
        offsets = []
        end = 0
        for rows, columns in shapes:
            offsets.append(end)
            end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
        ranks = [r for r, _, _ in layers]
        rank_offsets = [sum(ranks[:index]) for index in range(len(ranks))]
        return cls(tuple(ranks), tuple(shapes), tuple(offsets), tuple(rank_offsets), end, sum(ranks))

    @cached_property
    def members(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Factors of one kind and shape: 0 for A, 1 for B or 2 for E, with their places in `shapes`."""
        alike: dict[tuple[int, tuple[int, int]], list[int]] = {}
        for index, shape in enumerate(self.shapes):
            alike.setdefault((index % FACTORS_PER_LAYER, shape), []).append(index)
        return tuple((kind, tuple(indices)) for (kind, _), indices in alike.items())

    @cached_property
    def _lengths(self) -> list[int]:
        ends = [*self.offsets[1:], self.numel]
        return [end - start for start, end in zip(self.offsets, ends, strict=True)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return every factor's part of a flat buffer, in its shape."""
        return [
            part[: rows * columns].view(rows, columns)
            for part, (rows, columns) in zip(flat.split(self._lengths), self.shapes, strict=True)
        ]
