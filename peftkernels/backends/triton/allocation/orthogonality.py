"""AdaLoRA's orthogonality term and its gradient for all factors, in two launches.

    M = A·Aᵀ - I  (B: Bᵀ·B - I)    value w/(2n)·Σ‖M‖_F    gradient (w/n)·M·A/‖M‖_F  (B: B·M), 0 where ‖M‖_F = 0

The first launch has a program for every factor, which reads it once and leaves M and ‖M‖_F; the second has one for
every tile of every factor, which multiplies it by M, and before them one that adds up the norms. Sums are taken in fp32
(`input_precision="ieee"`), in a fixed order.

For 224 modules of 4096x4096 at r = 12 in fp32 both launches read the factors' 22.0 million numbers, and the second
reads and writes as many gradients: 352 MB, 73 µs at 4.8 TB/s; 56 modules a quarter. The first launch will take longer
than its share of 18 µs: two or three programs fit on each of 132 multiprocessors, with 10 kB each on their way at a
time, which at 1 µs from memory is 2.6 to 4 TB/s, 22 to 34 µs. Products are padded to 16 ranks: 22.0e6·16/12·16 =
470 million multiply-adds in each launch, 16 µs without matrix units at 132·128 a cycle and 1.7 GHz. With 64 ranks they
are 16 times as many, and take longer than the bytes. Computed, not measured.
"""

import functools

import torch
import triton
import triton.language as tl

from peftkernels.backends.triton.allocation.averages import ELEMENTS
from peftkernels.backends.triton.allocation.parts import (
    Block,
    address_of,
    block_of_ranks,
    lines_and_ranks,
    tile_of,
)
from peftkernels.backends.triton.common.launch import TYPES, Variant, options
from peftkernels.backends.triton.common.sums import added_lines

# What a matrix product takes at least, and ranks that a program holds at a time.
_FEWEST_RANKS, _MOST_RANKS = 16, 32
# Where a thread needs more than 128 registers the assembler, left to itself, stops there and spills some.
_REGISTERS_OF_CROWDED = 240
# The tile of `add_gradients`; larger ones spill on sm_100.
TILE = Block(128, _FEWEST_RANKS)
# Norms that are added at a time.
_NORMS = 1024


def gram_block(r: int) -> Block:
    """Lines and ranks of a step of `gram_matrices` where factors have up to r ranks."""
    ranks = block_of_ranks(r, _FEWEST_RANKS, _MOST_RANKS)
    # Products in full fp32 have no matrix unit: a thread holds the whole depth of its operands in registers.
    return Block(32 if ranks == _FEWEST_RANKS else 16, ranks)


@triton.jit
def kept_ranks(keep_ptr, first, rank, r):
    """Which of some ranks of a factor take part."""
    kept = rank < r
    if keep_ptr is not None:
        kept = kept & (tl.load(keep_ptr + first + rank, mask=kept, other=0) != 0)
    return kept


@triton.jit
def factor_tile(
    factor_ptr, keep_ptr, first, line_block, rank_block, lines, r,
    WIDE_TILE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(lines, ranks) of a factor in its dtype, zeros for ranks that take no part, whatever they hold."""
    _, rank, offsets, inside = lines_and_ranks(line_block, rank_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN)
    if keep_ptr is not None:
        inside = inside & kept_ranks(keep_ptr, first, rank, r)[None, :]
    return tl.load(factor_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def gram_of_blocks(
    factor_ptr, keep_ptr, first, row_block, column_block, lines, r,
    WIDE_TILE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr, ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over lines of the products of some ranks with others, fp32 (ranks, ranks)."""
    sums = tl.zeros((RANKS, RANKS), tl.float32)
    # With a number of its own the loop is overlapped with its loads, which it is not for these products otherwise.
    for line_block in tl.range(0, tl.cdiv(lines, LINES), num_stages=STAGES):
        rows = factor_tile(factor_ptr, keep_ptr, first, line_block, row_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN)
        columns = rows
        if not ONE_BLOCK:
            columns = factor_tile(
                factor_ptr, keep_ptr, first, line_block, column_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN
            )
        sums = tl.dot(tl.trans(rows), columns, sums, input_precision="ieee")
    return sums


@triton.jit
def gram_matrices(
    factors_ptr, numbers_ptr, addresses_ptr, keep_ptr, matrices_ptr, norms_ptr,
    FACTOR: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr, ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """M = A·Aᵀ - I, or Bᵀ·B - I, and ‖M‖_F of every factor, in fp32.

    Grid: factors of one dtype.

    Args:
        factors_ptr: int64 (all factors, 8), `parts.factor_table`.
        numbers_ptr: int32, the number of each program's factor.
        addresses_ptr: int64 (all factors,), where the factors lie.
        keep_ptr: u8 (Σ r,), 0 for ranks that take no part; or None.
        matrices_ptr: fp32, M (r, r) of every factor where its row of the table says; written.
        norms_ptr: fp32 (all factors,), ‖M‖_F; written.
    """
    factor = tl.load(numbers_ptr + tl.program_id(0))
    fields = factors_ptr + factor * 8
    lines = tl.load(fields + 1).to(tl.int32)
    r = tl.load(fields + 2).to(tl.int32)
    wide = tl.load(fields + 3)
    first = tl.load(fields + 4)
    matrices_ptr += tl.load(fields + 5)
    factor_ptr, _ = address_of(addresses_ptr, factor, FACTOR, EVEN)
    squares = tl.zeros((RANKS,), tl.float32)
    rank_blocks = tl.cdiv(r, RANKS)
    for row_block in range(rank_blocks):
        for column_block in range(rank_blocks):
            if wide != 0:
                gram = gram_of_blocks(
                    factor_ptr, keep_ptr, first, row_block, column_block, lines, r,
                    True, LINES, RANKS, EVEN, ONE_BLOCK, STAGES,
                )  # fmt: skip
            else:
                gram = gram_of_blocks(
                    factor_ptr, keep_ptr, first, row_block, column_block, lines, r,
                    False, LINES, RANKS, EVEN, ONE_BLOCK, STAGES,
                )  # fmt: skip
            row = row_block * RANKS + tl.arange(0, RANKS)
            column = column_block * RANKS + tl.arange(0, RANKS)
            one = (row[:, None] == column[None, :]) & kept_ranks(keep_ptr, first, row, r)[:, None]
            gram -= tl.where(one, 1.0, 0.0)
            squares += added_lines(gram * gram)
            inside = (row < r)[:, None] & (column < r)[None, :]
            tl.store(matrices_ptr + row[:, None] * r + column[None, :], gram, mask=inside)
    tl.store(norms_ptr + factor, tl.sqrt_rn(one_sum(squares)))


@triton.jit
def one_sum(values):
    """Σ of all values, a number, in a fixed order."""
    return tl.sum(added_lines(tl.reshape(values, (values.shape[0], 1))), 0)


@triton.jit
def add_norms(norms_ptr, value_ptr, share, count, NORMS: tl.constexpr):
    """value (1,) = share · Σ norms."""
    sums = tl.zeros((NORMS,), tl.float32)
    for first in range(0, count, NORMS):
        places = first + tl.arange(0, NORMS)
        sums += tl.load(norms_ptr + places, mask=places < count, other=0.0)
    tl.store(value_ptr, one_sum(sums) * share)


@triton.jit
def gradient_tile(
    factor_ptr, to_ptr, out_ptr, keep_ptr, matrix_ptr, first, start, line_block, rank_block, lines, r, coefficient,
    scale, WIDE_TILE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """coefficient·M·A (or B·M) for a tile: `scale` times it added in place (to), or written as it is (out, fp32)."""
    sums = tl.zeros((LINES, RANKS), tl.float32)
    _, rank, offsets, inside = lines_and_ranks(line_block, rank_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN)
    for other_block in range(tl.cdiv(r, RANKS)):
        values = factor_tile(
            factor_ptr, keep_ptr, first, line_block, other_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN
        )
        other = other_block * RANKS + tl.arange(0, RANKS)
        # M is symmetric: its rows serve A and its columns B.
        matrix = tl.load(
            matrix_ptr + other[:, None] * r + rank[None, :], mask=(other < r)[:, None] & (rank < r)[None, :], other=0.0
        )
        sums = tl.dot(values.to(tl.float32), matrix, sums, input_precision="ieee")
    gradient = sums * coefficient
    if out_ptr is not None:
        tl.store(out_ptr + start + offsets, gradient, mask=inside)
    if to_ptr is not None:
        before = tl.load(to_ptr + offsets, mask=inside, other=0.0)
        part = (gradient * scale).to(before.dtype).to(tl.float32)
        tl.store(to_ptr + offsets, (before.to(tl.float32) + part).to(before.dtype), mask=inside)


@triton.jit
def add_gradients(
    tiles_ptr, factors_ptr, addresses_ptr, to_addresses_ptr, out_ptr, keep_ptr, matrices_ptr, norms_ptr, value_ptr,
    share, scale, count,
    FACTOR: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """The term, and its gradient (w/n)·M·A/‖M‖_F, or B·M, in fp32.

    Grid: one program that adds up the norms where value_ptr is there; then tiles of factors of one dtype.

    Args:
        tiles_ptr: int32 (tiles, 4), `parts.tile_table`.
        factors_ptr: int64 (all factors, 8), `parts.factor_table`.
        addresses_ptr: int64 (all factors,), where the factors lie.
        to_addresses_ptr: int64 (all factors,), where the tensors lie that `scale` times the gradient is added to, in
            the factors' dtype; or None.
        out_ptr: fp32, flat, where gradients are written; or None.
        keep_ptr: u8 (Σ r,), 0 for ranks that take no part; or None.
        matrices_ptr: What `gram_matrices` wrote.
        norms_ptr: What `gram_matrices` wrote.
        value_ptr: One fp32, the term; written, or None.
        share: w/(2n).
        scale: What a gradient is multiplied by where it is added.
        count: How many norms there are.
    """
    program = tl.program_id(0)
    if value_ptr is not None:
        if program == 0:
            add_norms(norms_ptr, value_ptr, share, count, NORMS)
        program -= 1
    if program >= 0:
        factor, line_block, rank_block, start, lines, r, wide, first, result = tile_of(tiles_ptr, factors_ptr, program)
        factor_ptr, _ = address_of(addresses_ptr, factor, FACTOR, EVEN)
        to_ptr = None
        if to_addresses_ptr is not None:
            to_ptr, _ = address_of(to_addresses_ptr, factor, FACTOR, EVEN)
        norm = tl.load(norms_ptr + factor)
        coefficient = tl.where(norm == 0.0, 0.0, tl.div_rn(2.0 * share, tl.where(norm == 0.0, 1.0, norm)))
        if wide != 0:
            gradient_tile(
                factor_ptr, to_ptr, out_ptr, keep_ptr, matrices_ptr + result, first, start, line_block, rank_block,
                lines, r, coefficient, scale, True, LINES, RANKS, EVEN,
            )  # fmt: skip
        else:
            gradient_tile(
                factor_ptr, to_ptr, out_ptr, keep_ptr, matrices_ptr + result, first, start, line_block, rank_block,
                lines, r, coefficient, scale, False, LINES, RANKS, EVEN,
            )  # fmt: skip


def _label(dtype: torch.dtype, block: Block, keep: bool, even: bool) -> str:
    return f"{TYPES[dtype]} r{block.ranks}{' keep' * keep}{'' if even else ' unaligned'}"


@functools.cache
def gram_variant(dtype: torch.dtype, block: Block, one_block: bool, keep: bool, even: bool) -> Variant:
    """`gram_matrices` of factors of this dtype; one_block: none has more than block.ranks ranks."""
    types = {
        "factors_ptr": "*i64",
        "numbers_ptr": "*i32",
        "addresses_ptr": "*i64",
        "keep_ptr": "*u8" if keep else None,
        "matrices_ptr": "*fp32",
        "norms_ptr": "*fp32",
    }
    stages = 6 if block.ranks == _FEWEST_RANKS else 5
    warps = 4 if block.ranks == _FEWEST_RANKS and dtype is not torch.float32 else 8
    constants = {
        "FACTOR": ELEMENTS[dtype],
        "LINES": block.lines,
        "RANKS": block.ranks,
        "EVEN": even,
        "ONE_BLOCK": one_block,
        "STAGES": stages,
    }
    label = f"{_label(dtype, block, keep, even)}{'' if one_block else ' many ranks'}"
    chosen = options(warps, stages)
    if block.ranks > _FEWEST_RANKS or not even:
        chosen["maxnreg"] = _REGISTERS_OF_CROWDED
    return Variant(gram_matrices, types, constants, options=chosen, label=label)


@functools.cache
def gradient_variant(dtype: torch.dtype, value: bool, add: bool, keep: bool, even: bool) -> Variant:
    """`add_gradients` that adds to tensors, or writes; value: its first program adds up the norms."""
    types = {
        "tiles_ptr": "*i32",
        "factors_ptr": "*i64",
        "addresses_ptr": "*i64",
        "to_addresses_ptr": "*i64" if add else None,
        "out_ptr": None if add else "*fp32",
        "keep_ptr": "*u8" if keep else None,
        "matrices_ptr": "*fp32",
        "norms_ptr": "*fp32",
        "value_ptr": "*fp32" if value else None,
        "share": "fp32",
        "scale": "fp32",
        "count": "i32",
    }
    constants = {
        "FACTOR": ELEMENTS[dtype],
        "LINES": TILE.lines,
        "RANKS": TILE.ranks,
        "EVEN": even,
        "NORMS": _NORMS,
    }
    aligned = ("tiles_ptr", "factors_ptr", "addresses_ptr", "to_addresses_ptr", "out_ptr", "matrices_ptr", "norms_ptr")
    label = f"{_label(dtype, TILE, keep, even)}{' value' * value}{' add' if add else ' write'}"
    return Variant(add_gradients, types, constants, aligned=aligned, options=options(4, 1), label=label)
