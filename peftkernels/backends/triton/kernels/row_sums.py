"""What the backward pass takes from one read of G (or of x): sums over rows for the factors, and H on the way.

    sums_s (C, WIDTH) = Σ over the rows of split s of inᵀ·left        in (M, C), left S (∂B, ∂gate) or gated H (∂A)
    slots_c (M, WIDTH) = in[:, tile c] · B[tile c]                     the parts of H = G·B

in is G (M, N) for ∂B, ∂gate and H, so that C is N, and x (M, K) for ∂A, so that C is K.
∂gate needs no product of its own: Σ_t S_ti·H_ti = Σ_n B_ni·(Gᵀ·S)_ni. So a PROBE rank costs S and Gᵀ·S, an ACTIVE one
H besides. The kernels that reduce splits add the parts in order.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes, plan_types, size_types
from peftkernels.backends.triton.common.dropout import factor_from_bits
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import right_tile
from peftkernels.backends.triton.common.ranks import active_and_live, as_operand, rank_at, widened
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def left_tile(left_ptr, order_ptr, rows, places, M, r, WIDTH, n_live, COMPACT: tl.constexpr):
    """left (rows, places): compact, or S (M, r) as it was saved, whose live columns are gathered."""
    wide = rows.to(tl.int64)
    inside = (rows < M)[:, None]
    if COMPACT:
        left = tl.load(
            left_ptr + wide[:, None] * WIDTH + places[None, :], mask=inside & (places < WIDTH)[None, :], other=0.0
        )
    else:
        ranks = rank_at(order_ptr, places, r)
        live = inside & (places < n_live)[None, :]
        left = tl.load(left_ptr + wide[:, None] * r + ranks[None, :], mask=live, other=0.0)
    return left


@triton.jit
def row_sums(
    in_ptr, left_ptr, b_ptr, bits_ptr, order_ptr, counts_ptr, sums_ptr, slots_ptr,
    keep_scale, M, N, K, r, WIDTH, stride_in, splits, rows_of_split,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, OF_X: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of G or x times what is beside them, and the parts of H = G·B; both in fp32.

    Grid: column tiles × splits of the rows × blocks of places.

    Args:
        in_ptr: x (M, K) where OF_X, else G (M, N); rows `stride_in` apart, in the dtype of computation.
        left_ptr: Gated H (M, WIDTH), compact, where OF_X, else S (M, r); in the dtype of S; None without sums.
        b_ptr: B (N, r), or None without slots.
        bits_ptr: What `keep_bits` wrote: x passes dropout; or None.
        order_ptr, counts_ptr: The plan, or None.
        sums_ptr: fp32 (splits, C, WIDTH); written, or None.
        slots_ptr: fp32 (column tiles, M, WIDTH), the parts of H; written, or None.
        keep_scale: What dropout multiplies an element by that it keeps.
        M … WIDTH: `Sizes`.
        stride_in: From one row of in to the next.
        splits: Programs that share a column tile's rows.
        rows_of_split: A multiple of BLOCK_M.
    """
    if DEPENDENTS:
        # `reduce_rows` may start, and the product after it: both wait before they read what is written here.
        gdc_launch_dependents()
    C = K if OF_X else N
    n_active, n_live = active_and_live(counts_ptr, r)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    program = tl.program_id(0)
    places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = (program // place_blocks) % splits
    tile = program // (place_blocks * splits)
    column = tile * BLOCK_C
    columns = column + tl.arange(0, BLOCK_C)
    first = split * rows_of_split
    end = tl.minimum(first + rows_of_split, M)
    # Where no rank of the block is live nobody reads the result.
    end = tl.where((program % place_blocks) * BLOCK_R < n_live, end, first)
    sums = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if slots_ptr is not None:
        right = right_tile(b_ptr, order_ptr, columns, places, C, r, WIDTH, n_active, False, True)
        right = tl.trans(as_operand(right, in_ptr.dtype.element_ty))
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        values = tl.load(in_ptr + rows.to(tl.int64)[:, None] * stride_in + columns[None, :], mask=inside, other=0.0)
        if bits_ptr is not None:
            factor = factor_from_bits(bits_ptr, rows, column, M, C, keep_scale, BLOCK_C)
            values = as_operand(values.to(tl.float32) * factor, in_ptr.dtype.element_ty)
        values = widened(values)
        if sums_ptr is not None:
            left = left_tile(left_ptr, order_ptr, rows, places, M, r, WIDTH, n_live, OF_X)
            left = as_operand(left, in_ptr.dtype.element_ty)
            sums = tl.dot(tl.trans(values), left, sums, input_precision=PRECISION)
        if slots_ptr is not None:
            part = tl.dot(values, right, input_precision=PRECISION)
            offsets = (tile.to(tl.int64) * M + rows)[:, None] * WIDTH + places[None, :]
            tl.store(slots_ptr + offsets, part, mask=(rows < M)[:, None] & (places < WIDTH)[None, :])
    if sums_ptr is not None:
        offsets = (split.to(tl.int64) * C + columns)[:, None] * WIDTH + places[None, :]
        tl.store(sums_ptr + offsets, sums, mask=(columns < C)[:, None] & (places < WIDTH)[None, :])


class Split(NamedTuple):
    """How the rows are split: into how many parts, and how many rows one of them has."""

    splits: int
    rows: int


def launch(
    variant: Variant,
    programs: int,
    rows: Tensor,
    left: Tensor | None,
    bits: Tensor | None,
    adapter: AdapterArguments,
    results: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
    split: Split,
) -> None:
    """Launch `row_sums` over the rows of G or x.

    Args:
        variant: The kernel.
        programs: The grid.
        rows: G (M, N), or x (M, K).
        left: What is beside the rows, where sums are asked for.
        bits: What `keep_bits` wrote, where x passes dropout.
        adapter: The adapter.
        results: The sums and the parts of H, each or None.
        sizes: The call's sizes.
        split: How the rows are split.
    """
    variant(
        programs, rows, left, None if results[1] is None else adapter.lora_B, bits, adapter.order,
        adapter.counts, *results, adapter.numbers.keep_scale, *sizes, rows.stride(0), *split,
    )  # fmt: skip


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, of_x: bool, sums: bool, slots: bool) -> Variant:
    """For ∂A (of_x), or for ∂B, ∂gate (sums) and H (slots); kinds.dropout is heeded for ∂A alone."""
    types = {
        "in_ptr": pointer(kinds.x),
        "left_ptr": pointer(kinds.rank) if sums else None,
        "b_ptr": pointer(kinds.factor) if slots else None,
        "bits_ptr": "*i32" if kinds.dropout and of_x else None,
        **plan_types(kinds),
        "sums_ptr": "*fp32" if sums else None,
        "slots_ptr": "*fp32" if slots else None,
        "keep_scale": "fp32",
        **size_types(),
        **integers("stride_in", "splits", "rows_of_split"),
    }
    constants = {
        "BLOCK_M": blocks.sums_rows,
        "BLOCK_C": blocks.sums_columns,
        "BLOCK_R": block_of_places,
        "OF_X": of_x,
        "PRECISION": kinds.rank_precision,
        "DEPENDENTS": kinds.pdl and slots,
    }
    own = ("bits_ptr", "sums_ptr", "slots_ptr", "WIDTH", "rows_of_split")
    return Variant(
        row_sums,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("in_ptr", "left_ptr", "b_ptr", "N", "K", "stride_in")),
        options=options(8, 2),
        label=f"{kinds.label} r{block_of_places}{' of x' * of_x}{' sums' * sums}{' slots' * slots}",
    )
