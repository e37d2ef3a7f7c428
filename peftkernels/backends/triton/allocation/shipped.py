"""Every kernel of the allocation in the forms that calls take: what the tests compile without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkernels.backends.triton.allocation import averages, masks, orthogonality, threshold
from peftkernels.backends.triton.common.launch import Variant
from peftkernels.ops.rank_plan import RankState

# A rank for each size of tile that differs in more than its masks.
_TILES = (4, 16, 64)
# Ranks that take one tile, and several.
_USUAL, _MANY = 12, 64


def variants() -> Iterator[Variant]:
    """Sizes of tiles with fp32 factors, and every option in some form of each kernel.

    float16 differs from bfloat16 in the names of instructions alone: each kernel is there once.
    """
    usual = averages.narrow(_USUAL)
    for dtype in averages.ELEMENTS:
        even = dtype is not torch.float32
        yield averages.finite_variant(dtype, dtype, usual, even)
        yield averages.update_variant(dtype, dtype, usual, True, even)
        yield from _term(dtype, _USUAL, not even)
    for r in _TILES:
        yield averages.update_variant(torch.float32, torch.float32, averages.narrow(r), False, True)
    yield averages.finite_variant(torch.float32, torch.float32, usual, True)
    yield averages.update_variant(torch.bfloat16, torch.float32, usual, False, True)
    yield averages.sums_variant(usual, True)
    yield averages.scores_variant(usual)
    for dtype, r, keep in (
        (torch.float32, _MANY // 2, False),
        (torch.float32, _MANY // 2, True),
        (torch.float32, _MANY, False),
        (torch.float32, _MANY, True),
        (torch.bfloat16, _MANY, False),
    ):
        block = orthogonality.gram_block(r)
        yield orthogonality.gram_variant(dtype, block, r <= block.ranks, keep, not keep)
    yield threshold.variant(False, None)
    yield threshold.variant(True, torch.int64)
    for ranks in (16, 1024):
        yield masks.variant(ranks, True, int(RankState.ACTIVE))


def _term(dtype: torch.dtype, r: int, both: bool) -> Iterator[Variant]:
    """With aligned factors, and where asked for also with unaligned ones and masks."""
    block = orthogonality.gram_block(r)
    yield orthogonality.gram_variant(dtype, block, True, False, True)
    yield orthogonality.gradient_variant(dtype, True, True, False, True)
    if both:
        yield orthogonality.gram_variant(dtype, block, True, True, False)
        yield orthogonality.gradient_variant(dtype, True, False, True, False)
