"""Every kernel in every form that a table may choose: what the tests compile without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkernels.backends.triton import columns, decode, dropout, expand, finish, gemm, given, shrink, single, tiles
from peftkernels.backends.triton.allocation import shipped as allocation
from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import Variant
from peftkernels.backends.triton.tiles import TMA, Blocks, Tile, blocks_for


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
        yield gemm.tma_variant(everything, tile, False)
        yield gemm.tma_variant(everything, tile, True)
        yield gemm.tma_variant(plain, tile, True)
        yield single.tma_variant(everything, blocks, tile, single.MOST_PLACES, True)
    else:
        yield gemm.pointer_variant(everything, tile, False, True)
        yield gemm.pointer_variant(everything, tile, True, True)
        yield gemm.pointer_variant(plain, tile, True, True)
        yield single.pointer_variant(everything, blocks, tile, single.MOST_PLACES, True, True)


def _others(everything: Kinds, plain: Kinds, blocks: Blocks, brief: bool) -> Iterator[Variant]:
    for places in _places(blocks.shrink_places, brief):
        yield shrink.variant(everything, blocks, places, True, True, False, True)
        yield shrink.variant(plain, blocks, places, False, True, True, False)
        yield given.variant(everything, blocks, places, True)
    for places in _places(blocks.column_places, brief):
        yield columns.variant(everything, blocks, places, False, True, True)
        yield columns.variant(everything, blocks, places, True, True, False)
        if plain is not everything:
            yield columns.variant(plain, blocks, places, False, True, True)
    for places in _places(finish.MOST_PLACES, True):
        yield finish.rows_variant(everything, blocks, places, True, True, True)
        yield finish.grad_B_variant(everything, blocks, places, True, True)
        yield finish.grad_A_variant(everything, blocks, places, True, True)
    yield dropout.bits_variant(everything)
    yield expand.variant(everything, True)
    if plain.rank is not plain.x:
        yield expand.variant(plain, False)
        yield expand.variant(plain, True)


def _places(most: int, brief: bool) -> list[int]:
    """Numbers of places that a program may hold; brief: the largest."""
    return [most] if brief else [places for places in (16, 32, 64, 128) if places <= most]
