"""Every kernel in every form that a table may choose: what the tests compile without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkernels.backends.triton.allocation import shipped as allocation
from peftkernels.backends.triton.common import tiles
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant
from peftkernels.backends.triton.common.tiles import TMA, Blocks, Tile, blocks_for
from peftkernels.backends.triton.kernels import (
    decode,
    expand,
    gemm_pointer,
    gemm_tma,
    keep_bits,
    pieces,
    precomputed_shrink,
    reduce_grad_A,
    reduce_grad_B,
    reduce_rows,
    row_sums,
    shrink,
    single_pointer,
    single_tma,
)


def _kinds(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Kinds, Kinds]:
    """A call with everything there is, with fp32 factors as HF peft has them, and one with nothing beside A and B."""
    pdl = capability >= (9, 0)
    everything = Kinds(dtype, torch.float32, torch.float32, torch.float32, plan=True, dropout=True, bias=True, pdl=pdl)
    return everything, Kinds(dtype, dtype, pdl=pdl)


def variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """For a compute capability: every kernel with every shipped tile and number of places.

    Options that add code (plan, gate, dropout, factors of another dtype, bias) are all on in one form and all off in
    another. float16 differs from bfloat16 in the names of instructions alone: each kernel is there once. Operands
    without alignment, or with a K that no Philox block divides, take the library's GEMM: the kernels around it are
    there in that form.
    """
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        everything, plain = _kinds(dtype, capability)
        blocks = blocks_for(dtype, False)
        shipped = tiles.shipped(str(dtype).removeprefix("torch."), capability)
        if dtype is torch.float16:
            kinds = [tile.kind for tile in shipped]
            shipped = tuple(shipped[kinds.index(kind)] for kind in dict.fromkeys(kinds))
        for tile in shipped:
            yield from _products(everything, plain, blocks, tile)
        yield from _others(everything, plain, blocks, brief=dtype is torch.float16)
    ragged = Kinds(
        torch.bfloat16, torch.bfloat16, torch.bfloat16, plan=True, dropout=True, bias=True, aligned=False, whole=False,
        pdl=capability >= (9, 0),
    )  # fmt: skip
    yield from _others(ragged, ragged, blocks_for(ragged.x, False), brief=True)
    yield from allocation.variants()


def _products(everything: Kinds, plain: Kinds, blocks: Blocks, tile: Tile) -> Iterator[Variant]:
    if tile.kind == tiles.DECODE_TILE:
        yield decode.variant(plain, tile, 16, False)
        yield decode.variant(plain._replace(factor=torch.float32), tile, 16, True)
        yield decode.variant(everything, tile, decode.most_places(everything), True)
    elif tile.kind == TMA:
        yield gemm_tma.variant(everything, tile, False)
        yield gemm_tma.variant(everything, tile, True)
        yield gemm_tma.variant(plain, tile, True)
        yield single_tma.variant(everything, blocks, tile, pieces.MOST_PLACES, True)
    else:
        yield gemm_pointer.variant(everything, tile, False, True)
        yield gemm_pointer.variant(everything, tile, True, True)
        yield gemm_pointer.variant(plain, tile, True, True)
        yield single_pointer.variant(everything, blocks, tile, pieces.MOST_PLACES, True, True)


def _others(everything: Kinds, plain: Kinds, blocks: Blocks, brief: bool) -> Iterator[Variant]:
    for places in _places(blocks.shrink_places, brief):
        yield shrink.variant(everything, blocks, places, True, True, False, True)
        yield shrink.variant(plain, blocks, places, False, True, True, False)
        yield precomputed_shrink.variant(everything, blocks, places, True)
    for places in _places(blocks.sums_places, brief):
        yield row_sums.variant(everything, blocks, places, False, True, True)
        yield row_sums.variant(everything, blocks, places, True, True, False)
        if plain is not everything:
            yield row_sums.variant(plain, blocks, places, False, True, True)
    for places in _places(blocks.reduce_places, True):
        yield reduce_rows.variant(everything, blocks, places, True, True, True)
        yield reduce_grad_B.variant(everything, blocks, places, True, True)
        yield reduce_grad_A.variant(everything, blocks, places, True, True)
    yield keep_bits.variant(everything)
    yield expand.variant(everything, True)
    if plain.rank is not plain.x:
        yield expand.variant(plain, False)
        yield expand.variant(plain, True)


def _places(most: int, brief: bool) -> list[int]:
    """Numbers of places that a program may hold; brief: the largest."""
    return [most] if brief else [places for places in (16, 32, 64, 128) if places <= most]
