"""Every kernel of the allocation in the forms that calls take: what the tests compile without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkernels.backends.triton.allocation import averages, masks, orthogonality, threshold
from peftkernels.backends.triton.launch import Variant
from peftkernels.rank_plan import RankState

# A rank for each size of tile, and for some of them.
_TILES, _FEW_TILES, _TERM_TILES = (4, 8, 16, 32, 64), (4, 16, 64), (16, 32, 64)
_USUAL = 12


def variants() -> Iterator[Variant]:
    """Every size of tile with fp32 factors, and every option in some form of each kernel.

    float16 differs from bfloat16 in the names of instructions alone: each kernel is there once.
    """
    for dtype in averages.ELEMENTS:
        yield averages.finite_variant(dtype, dtype, averages.narrow(_USUAL), dtype is not torch.float32)
        yield averages.update_variant(dtype, dtype, averages.narrow(_USUAL), True, False)
        for r in (_USUAL,) if dtype is torch.float16 else _TERM_TILES:
            yield from _term(dtype, r)
    for r in _TILES:
        yield averages.update_variant(torch.float32, torch.float32, averages.narrow(r), False, True)
    for r in _FEW_TILES:
        yield averages.finite_variant(torch.float32, torch.float32, averages.narrow(r), True)
        yield averages.sums_variant(averages.narrow(r), True)
        yield averages.scores_variant(averages.narrow(r))
    yield averages.update_variant(torch.bfloat16, torch.bfloat16, averages.narrow(_USUAL), False, True)
    yield averages.update_variant(torch.bfloat16, torch.float32, averages.narrow(_USUAL), False, True)
    for exact in (False, True):
        yield threshold.variant(exact, None)
        yield threshold.variant(exact, torch.int64)
    for ranks in (16, 1024):
        yield masks.variant(ranks, True, int(RankState.ACTIVE))


def _term(dtype: torch.dtype, r: int) -> Iterator[Variant]:
    gram, tile = orthogonality.gram_block(r), orthogonality.gradient_block(r)
    yield orthogonality.gram_variant(dtype, gram, r <= gram.ranks, False, True)
    yield orthogonality.gram_variant(dtype, gram, r <= gram.ranks, True, False)
    yield orthogonality.gradient_variant(dtype, tile, True, True, False, True)
    yield orthogonality.gradient_variant(dtype, tile, True, False, True, False)
