"""A plain GEMM whose loads have a warp of their own ("warp specialised"), which no shipped kernel has.

Not every release of Triton compiles it, and some end the process where they cannot: `refusal` tries in another one.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.launch import (
    INTERPRETED,
    Variant,
    descriptor,
    integers,
    options,
    pointer,
)
from peftkernels.backends.triton.common.products import store_tile, tile_at
from peftkernels.backends.triton.common.tiles import GROUP, TMA, Tile
from peftkernels.backends.triton.common.tma import descriptor_of
from peftkernels.backends.triton.linear.frozen_product import resident_programs

# Four warps that Triton doubles for wide tiles, beside the one that loads.
TILES = (Tile(TMA, 128, 256, 64, 4, 3), Tile(TMA, 128, 128, 64, 4, 4))
COMPILE_SECONDS = 120


@triton.jit
def specialised_gemm(
    x_desc, w_desc, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) · Wᵀ. Its stores go through pointers: Triton 3.6 compiles no others here."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=True):
        row_block, column_block = tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        row = row_block * BLOCK_M
        column = column_block * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            sums = tl.dot(x_desc.load([row, start]), w_desc.load([column, start]).T, sums)
        store_tile(sums, y_ptr, row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), M, N)


def _blocks(tile: Tile) -> tuple[list[int], list[int]]:
    return [tile.rows, tile.depth], [tile.columns, tile.depth]


@functools.cache
def variant(dtype: torch.dtype, tile: Tile) -> Variant:
    """`specialised_gemm` for 16-bit operands whose rows are multiples of 16 bytes."""
    x, w = _blocks(tile)
    types = {
        "x_desc": descriptor(dtype, x),
        "w_desc": descriptor(dtype, w),
        "y_ptr": pointer(dtype),
        **integers("M", "N", "K"),
    }
    constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": GROUP}
    return Variant(
        specialised_gemm,
        types,
        constants,
        aligned=("y_ptr", "N", "K"),
        options=options(tile.warps, tile.stages),
        wgmma=True,
        label=f"{dtype} {tile.name}".removeprefix("torch."),
    )


def product(tile: Tile, x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) · Wᵀ, W (N, K)."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    descriptors = [descriptor_of(tensor, block) for tensor, block in zip((x, weight), _blocks(tile), strict=True)]
    variant(x.dtype, tile)(resident_programs(x.device, tile, m, n), *descriptors, y, m, n, k)
    return y


@functools.cache
def refusal(dtype: torch.dtype, tile: Tile, capability: tuple[int, int]) -> str | None:
    """None when this Triton compiles the kernel for a compute capability, with loads in a warp of their own.

    The interpreter knows no warps, and runs it.
    """
    if INTERPRETED:
        return None
    names = (str(dtype).removeprefix("torch."), tile.name, *map(str, capability))
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *names], capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"Triton {triton.__version__} did not compile it in {COMPILE_SECONDS} s"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"Triton {triton.__version__} does not compile it (exit code {done.returncode}): {last}"


def _try_to_compile(dtype: str, tile: str, major: str, minor: str) -> None:
    from peftkernels.backends.triton.common.tiles import tile as named

    ptx = variant(getattr(torch, dtype), named(tile)).compile((int(major), int(minor))).asm["ptx"]
    # Where Triton ignores the wish, all warps keep the registers that they began with.
    if "setmaxnreg" not in ptx:
        sys.exit("warp_specialize was ignored")


if __name__ == "__main__":
    _try_to_compile(*sys.argv[1:])
