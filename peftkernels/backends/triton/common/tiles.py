"""Tile shapes of the products: what can be named in a table, timed by the tuner and compiled by the tests."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

TMA, POINTER, DECODE_TILE = KINDS = ("tma", "pointer", "decode")
# Row blocks that go through all columns together: their rows of x stay in the L2.
GROUP = 8
_NAME = re.compile(r"([a-z]+)-(\d+)x(\d+)x(\d+)-(\d+)w-(\d+)s")


@dataclass(frozen=True)
class Tile:
    """How one program walks a product out = in · Wop (see `products`).

    Attributes:
        kind: "tma": tiles come through the tensor memory accelerator (compute capability 9.0 and later) to programs
            that stay and take one tile after another; "pointer": ordinary loads, one program a tile, any GPU, any
            alignment; "decode": all rows of a call with few of them, one program for `columns` columns.
        rows: Rows of the tile of out.
        columns: Columns of the tile of out.
        depth: How much of the product's depth one step takes.
        warps: Warps of a program.
        stages: Steps that are in flight.
    """

    kind: str
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def programs(self) -> int:
        """Programs of a TMA kernel that one multiprocessor holds at once: one's stores hide behind another's steps.

        Of 227 KiB of shared memory, the stages of both operands and half the tile on its way out; two at the most,
        which registers allow for tiles of up to 128 × 128.
        """
        shared = self.stages * (self.rows + self.columns) * self.depth * 2 + self.rows * self.columns
        fits = 227 * 1024 // (shared + 2048)
        return 2 if fits >= 2 and self.rows * self.columns <= 128 * 128 else 1

    @property
    def name(self) -> str:
        """As tables and messages write it, `tma-128x256x64-8w-3s`; `tile(name)` reads it back."""
        return f"{self.kind}-{self.rows}x{self.columns}x{self.depth}-{self.warps}w-{self.stages}s"

    def suits_wgmma(self, dtype: torch.dtype) -> bool:
        """Return True if a warpgroup's matrix instructions fit: at least 64 rows of 16-bit operands."""
        return dtype.itemsize == 2 and self.rows >= 64


@functools.lru_cache(maxsize=256)
def tile(name: str) -> Tile:
    """Return the tile of that name.

    Args:
        name: Such as "tma-128x256x64-8w-3s".

    Raises:
        ValueError: For anything else.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or parts[1] not in KINDS:
        raise ValueError(f"tile: found {name!r}, expected a name such as 'tma-128x256x64-8w-3s'")
    return Tile(parts[1], *(int(number) for number in parts.groups()[1:]))


# Wide tiles keep the tensor cores busy, narrow ones give small products enough programs. Stages are as many as fit
# the shared memory (227 KiB from 9.0 on, 163 KiB on 8.0) beside what the store of the tile needs.
_TMA = (
    Tile(TMA, 128, 256, 64, 8, 4),
    Tile(TMA, 128, 256, 64, 8, 3),
    Tile(TMA, 128, 128, 64, 8, 4),
    Tile(TMA, 128, 128, 64, 8, 3),
    Tile(TMA, 64, 256, 64, 4, 3),
    Tile(TMA, 128, 64, 64, 4, 4),
    Tile(TMA, 64, 128, 64, 4, 4),
)
_POINTER = (
    Tile(POINTER, 128, 128, 64, 8, 3),
    Tile(POINTER, 128, 128, 32, 8, 4),
    Tile(POINTER, 64, 128, 64, 4, 4),
    Tile(POINTER, 64, 64, 64, 4, 4),
    Tile(POINTER, 16, 128, 64, 4, 4),
)
# The single launch runs out of registers there with a stage more.
_POINTER_FROM_10 = (*_POINTER[:3], Tile(POINTER, 64, 64, 64, 4, 3), *_POINTER[4:])
_DECODE = (
    Tile(DECODE_TILE, 16, 16, 128, 4, 4),
    Tile(DECODE_TILE, 16, 32, 128, 4, 5),
    Tile(DECODE_TILE, 16, 64, 128, 4, 3),
)
# Four bytes an element, and no tensor cores unless TF32 is allowed.
_WIDE_FP32 = Tile(POINTER, 64, 64, 32, 8, 3)
# For 10.0 some release of Triton spills registers of eight warps, or of four with three stages; for 8.0 of four.
_WIDE_FP32_FROM_10 = Tile(POINTER, 64, 64, 32, 4, 2)
_NARROW_FP32 = Tile(POINTER, 16, 64, 64, 4, 3)
_DECODE_FP32 = (Tile(DECODE_TILE, 16, 32, 32, 4, 4),)


@dataclass(frozen=True)
class Blocks:
    """How the kernels beside the GEMM cut their work.

    Where ranks are more than a program holds, programs beside it hold the others, and find x or G in the L2.

    Attributes:
        shrink_rows: Rows of x in one step of the shrink.
        shrink_depth: Columns of x in one step of the shrink.
        shrink_places: Ranks that a program of the shrink holds at the most.
        fewest_steps: Steps of a split of K: shorter ones cost more than they spread.
        sums_rows: Rows of G or x in one step of the sums over rows.
        sums_columns: Columns of G or x in one step of the sums over rows.
        sums_places: Ranks that a program of the sums over rows holds at the most.
        reduce_lines: Lines of a program that reduces splits.
        reduce_places: Ranks that a program that reduces splits holds at the most.
        pack: Columns of B or A of a program that packs them.
        piece: Rows of x in a piece of the single launch.
        shrink_spread: Programs a multiprocessor that splits of K aim at.
        sums_spread: Programs a multiprocessor that splits of the rows aim at.
    """

    shrink_rows: int = 64
    shrink_depth: int = 64
    shrink_places: int = 64
    fewest_steps: int = 16
    sums_rows: int = 64
    sums_columns: int = 256
    sums_places: int = 64
    reduce_lines: int = 32
    reduce_places: int = 128
    pack: int = 128
    piece: int = 32
    shrink_spread: int = 1
    sums_spread: int = 2


BLOCKS = Blocks()
# Products of fp32 operands hold them in registers.
BLOCKS_FP32 = Blocks(shrink_depth=32, shrink_places=32, fewest_steps=32, sums_rows=16, sums_columns=64, sums_places=32)
# G and x are widened to float32 beside their ranks, in registers.
BLOCKS_FP16 = Blocks(sums_columns=128, sums_places=32)
# Small enough that small matrices have edges, several tiles and several splits in every dimension.
BLOCKS_INTERPRETED = Blocks(16, 32, 64, 1, 32, 32, 32, 32, 128, 32, 16, 4, 4)


_BLOCKS = {torch.float32: BLOCKS_FP32, torch.float16: BLOCKS_FP16}


def blocks_for(dtype: torch.dtype, interpreted: bool) -> Blocks:
    """The blocks for operands of `dtype`; they depend on nothing else, so that sums are always taken in one order."""
    if interpreted:
        return BLOCKS_INTERPRETED
    return _BLOCKS.get(dtype, BLOCKS)


def shipped(dtype: str, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Every tile that may be chosen for operands of `dtype` on a GPU of this compute capability."""
    if dtype == "float32":
        wide = _WIDE_FP32 if capability < (10, 0) else _WIDE_FP32_FROM_10
        return (wide, _NARROW_FP32, *_DECODE_FP32)
    if capability < (9, 0):
        return (*_POINTER, *_DECODE)
    if capability < (10, 0):
        return (*_TMA, *_POINTER, *_DECODE)
    # From 10.0 on the sums lie in tensor memory; the narrow tiles' stores run out of registers there, and so do those
    # of the wide ones beside float32 operands of ranks.
    return (*(_TMA[6:] if dtype == "float16" else _TMA[1:3]), *_POINTER_FROM_10, *_DECODE)
