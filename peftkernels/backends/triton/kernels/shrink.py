"""S = drop(x)·Aᵀ over the live ranks: one read of x, the dropout mask recomputed on the way.

The launch carries programs that pack B for the GEMM's tail, and splits K where M alone gives too few programs; the
parts lie in slots that `reduce_rows` adds in order.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from peftkernels.backends.triton.common.arguments import (
    AdapterArguments,
    Sizes,
    adapter_types,
    number_types,
    size_types,
)
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, pack_columns, store_by_rank
from peftkernels.backends.triton.common.shrink_rows import shrink_rows
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def shrink(
    x_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr,
    shrink_ptr, left_ptr, slots_ptr, right_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x, splits, chunk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Make S in fp32, and write it as it is asked for.

    Grid: row blocks × splits of K × blocks of places; then, where right_ptr is there, column blocks of B.

    Args:
        x_ptr: x (M, K), rows `stride_x` apart, in the dtype of computation.
        a_ptr … seed_ptr: The `AdapterArguments`; b None without right, seed None without dropout.
        shrink_ptr: S (M, r) in the order of the factors, fp32 beside float16 and else in x's dtype; or None.
        left_ptr: S·scaling·ĝ (M, WIDTH), compact, in the same dtype; or None.
        slots_ptr: The parts of S, fp32 (splits, M, WIDTH), instead of shrink and left; or None.
        right_ptr: B's ACTIVE columns (N, WIDTH), in the dtype of left; or None.
        scaling … least: The adapter's `Numbers`.
        M … WIDTH: `Sizes`.
        stride_x: From one row of x to the next.
        splits: Programs that share a row block's K.
        chunk: Columns of x in a split, a multiple of BLOCK_K.
    """
    if DEPENDENTS:
        # The GEMM may start its main loop: it waits for this launch to end just before its tail.
        gdc_launch_dependents()
    program = tl.program_id(0)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    shrinking = tl.cdiv(M, BLOCK_M) * splits * place_blocks
    if program < shrinking:
        n_active, n_live = active_and_live(counts_ptr, r)
        places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        split = (program // place_blocks) % splits
        rows = (program // (place_blocks * splits)) * BLOCK_M + tl.arange(0, BLOCK_M)
        first = split * chunk
        end = tl.minimum(first + chunk, K)
        # Where no rank of the block is live there is nothing to add.
        end = tl.where((program % place_blocks) * BLOCK_R < n_live, end, first)
        sums = shrink_rows(
            x_ptr, a_ptr, order_ptr, seed_ptr, rows, places, first, end, M, K, r, stride_x, least, keep_scale, n_live,
            BLOCK_K, WHOLE_BLOCKS, PRECISION,
        )  # fmt: skip
        if slots_ptr is not None:
            offsets = (split.to(tl.int64) * M + rows)[:, None] * WIDTH + places[None, :]
            tl.store(slots_ptr + offsets, sums, mask=(rows < M)[:, None] & (places < WIDTH)[None, :])
        else:
            store_by_rank(
                sums, shrink_ptr, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
                n_active, n_live,
            )  # fmt: skip
    elif right_ptr is not None:
        pack_columns(program - shrinking, b_ptr, right_ptr, order_ptr, counts_ptr, N, r, WIDTH, BLOCK_N)


class Outputs(NamedTuple):
    """What a launch writes; each None where it is not asked for.

    Attributes:
        shrink: S (M, r) in the order of the factors.
        left: The compact operand (M, WIDTH) of the next product.
        slots: fp32 (splits, M, WIDTH), instead of both where K is split.
        right: B's packed columns (N, WIDTH).
    """

    shrink: Tensor | None = None
    left: Tensor | None = None
    slots: Tensor | None = None
    right: Tensor | None = None


class Split(NamedTuple):
    """How K is split: into how many parts, and how many columns of x one of them has."""

    splits: int
    chunk: int


def launch(
    variant: Variant,
    programs: int,
    rows: Tensor,
    adapter: AdapterArguments,
    outputs: Outputs,
    sizes: Sizes,
    split: Split,
) -> None:
    """Launch `shrink` over the rows of x."""
    lora_A, lora_B, *ranks_and_seed, numbers = adapter
    variant(
        programs, rows, lora_A, None if outputs.right is None else lora_B, *ranks_and_seed, *outputs, *numbers, *sizes,
        rows.stride(0), *split,
    )  # fmt: skip


@functools.cache
def variant(
    kinds: Kinds, blocks: Blocks, block_of_places: int, keep: bool, left: bool, split: bool, pack: bool
) -> Variant:
    """The shrink that writes S (keep), the compact operand (left) and B's packed columns (pack), K split or not."""
    rank = pointer(kinds.rank)
    # Many ranks, or random words that neighbours do not share, fill the registers of four warps.
    crowded = (block_of_places > 32) + (kinds.dropout and not kinds.whole)
    warps = 8 if crowded or block_of_places > 16 else 4
    types = {
        "x_ptr": pointer(kinds.x),
        **adapter_types(kinds, b=pack),
        "shrink_ptr": rank if keep and not split else None,
        "left_ptr": rank if left and not split else None,
        "slots_ptr": "*fp32" if split else None,
        "right_ptr": rank if pack else None,
        **number_types(),
        **size_types(),
        **integers("stride_x", "splits", "chunk"),
    }
    constants = {
        "BLOCK_M": blocks.shrink_rows,
        "BLOCK_K": max(16, blocks.shrink_depth >> crowded),
        "BLOCK_R": block_of_places,
        "BLOCK_N": blocks.pack,
        "WHOLE_BLOCKS": kinds.whole,
        "PRECISION": kinds.rank_precision,
        "DEPENDENTS": kinds.pdl,
    }
    outputs = ("shrink_ptr", "left_ptr", "slots_ptr", "right_ptr", "WIDTH", "chunk")
    aligned = kinds.aligned_names(outputs, ("x_ptr", "a_ptr", "b_ptr", "K", "stride_x"))
    label = f"{kinds.label} r{block_of_places}{' keep' * keep}{' left' * left}{' split' * split}{' pack' * pack}"
    return Variant(shrink, types, constants, aligned=aligned, options=options(warps, 4), label=label)
