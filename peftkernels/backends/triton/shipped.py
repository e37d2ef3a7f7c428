"""Every kernel in every form that a table may choose: what the tests compile without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkernels.backends.triton import columns, decode, dropout, expand, finish, gemm, shrink, single, tiles
from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import Variant
from peftkernels.backends.triton.tiles import TMA, blocks_for

PLACES = (16, 32, 64, 128)


def _kinds(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Kinds, Kinds]:
    """A call with everything there is, with fp32 factors as HF peft has them, and one with nothing beside A and B."""
    pdl = capability >= (9, 0)
    everything = Kinds(dtype, torch.float32, torch.float32, torch.float32, plan=True, dropout=True, bias=True, pdl=pdl)
    return everything, Kinds(dtype, dtype, pdl=pdl)


def variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """For a compute capability: every kernel with every shipped tile, dtype and number of places.

    Options that add code (plan, gate, dropout, factors of another dtype, bias) are all on in one form and all off in
    another; alignment, which only adds masks, is varied for one tile of each kernel.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        everything, plain = _kinds(dtype, capability)
        yield from _products(everything, plain, capability)
        yield from _others(everything, plain)
    yield from _ragged(capability)


def _products(everything: Kinds, plain: Kinds, capability: tuple[int, int]) -> Iterator[Variant]:
    blocks = blocks_for(plain.x, False)
    for tile in tiles.shipped(str(plain.x).removeprefix("torch."), capability):
        if tile.kind == tiles.DECODE_TILE:
            yield decode.variant(plain, tile, 16, False)
            yield decode.variant(everything, tile, 128, True)
            continue
        if tile.kind == TMA:
            yield gemm.tma_variant(everything, tile, False)
            yield gemm.tma_variant(everything, tile, True)
            yield gemm.tma_variant(plain, tile, True)
            yield single.tma_variant(everything, blocks, tile, 64, True)
        else:
            yield gemm.pointer_variant(everything, tile, False, True)
            yield gemm.pointer_variant(everything, tile, True, True)
            yield gemm.pointer_variant(plain, tile, True, True)
            yield single.pointer_variant(everything, blocks, tile, 64, True, True)


def _others(everything: Kinds, plain: Kinds) -> Iterator[Variant]:
    blocks = blocks_for(plain.x, False)
    for places in PLACES:
        yield shrink.variant(everything, blocks, places, True, False, True)
        yield columns.variant(everything, blocks, places, False, True, True)
        yield columns.variant(everything, blocks, places, True, True, False)
    for places in (16, 128):
        yield shrink.variant(plain, blocks, places, False, True, False)
        yield columns.variant(plain, blocks, places, False, True, True)
        yield finish.rows_variant(everything, blocks, places, True, True, True)
        yield finish.grad_B_variant(everything, blocks, places, True, True)
        yield finish.grad_A_variant(everything, blocks, places, True, True)
    yield dropout.bits_variant(plain)
    yield expand.variant(everything)


def _ragged(capability: tuple[int, int]) -> Iterator[Variant]:
    """Operands without alignment, and a K that no step and no Philox block divides."""
    kinds = Kinds(
        torch.bfloat16, torch.bfloat16, torch.bfloat16, plan=True, dropout=True, bias=True, aligned=False, whole=False,
        pdl=capability >= (9, 0),
    )  # fmt: skip
    blocks = blocks_for(kinds.x, False)
    tile = tiles.tile("pointer-128x128x64-8w-3s")
    yield gemm.pointer_variant(kinds, tile, False, False)
    yield gemm.pointer_variant(kinds, tile, True, False)
    yield single.pointer_variant(kinds, blocks, tile, 16, True, False)
    yield decode.variant(kinds, tiles.tile("decode-16x32x128-4w-4s"), 16, True)
    yield shrink.variant(kinds, blocks, 16, True, False, True)
    yield columns.variant(kinds, blocks, 16, False, True, True)
    yield dropout.bits_variant(kinds)
