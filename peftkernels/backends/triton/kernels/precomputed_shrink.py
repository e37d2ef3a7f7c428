"""An S that the caller has already, as the GEMM's tail takes it: a launch that reads no x."""

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes, rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, pack_columns, rank_at, store_by_rank
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def precomputed_shrink(
    shrink_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, left_ptr, right_ptr,
    scaling, M, N, K, r, WIDTH, stride_shrink,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Gate a precomputed S, and pack B.

    Grid: row blocks × blocks of places; then, where right_ptr is there, column blocks of B.

    Args:
        shrink_ptr: S (M, r) in the order of the factors, rows `stride_shrink` apart, fp32 beside float16 and else in
            x's dtype.
        b_ptr: B (N, r).
        order_ptr … scaling_ptr: `AdapterArguments.ranks`.
        left_ptr: S·scaling·ĝ (M, WIDTH), compact, in the dtype of S; written.
        right_ptr: B's ACTIVE columns (N, WIDTH) in the dtype of S; written, or None.
        scaling: The scaling where it is no tensor.
        M … WIDTH: `Sizes`.
        stride_shrink: From one row of S to the next.
    """
    if DEPENDENTS:
        # The GEMM may start its main loop: it waits for this launch to end just before its tail.
        gdc_launch_dependents()
    program = tl.program_id(0)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    gating = tl.cdiv(M, BLOCK_M) * place_blocks
    if program < gating:
        n_active, n_live = active_and_live(counts_ptr, r)
        rows = (program // place_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        ranks = rank_at(order_ptr, places, r)
        offsets = rows.to(tl.int64)[:, None] * stride_shrink + ranks[None, :]
        inside = (rows < M)[:, None] & (places < n_active)[None, :]
        values = tl.load(shrink_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        store_by_rank(
            values, None, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
            n_active, n_live,
        )  # fmt: skip
    elif right_ptr is not None:
        pack_columns(program - gating, b_ptr, right_ptr, order_ptr, counts_ptr, N, r, WIDTH, BLOCK_N)


def launch(
    variant: Variant,
    programs: int,
    shrink: Tensor,
    adapter: AdapterArguments,
    left: Tensor,
    right: Tensor | None,
    sizes: Sizes,
) -> None:
    """Launch `precomputed_shrink`; right: where B's packed columns go, None where B itself serves."""
    variant(
        programs, shrink, adapter.lora_B, *adapter.ranks, left, right, adapter.numbers.scaling, *sizes,
        shrink.stride(0),
    )  # fmt: skip


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, pack: bool) -> Variant:
    """`precomputed_shrink` that packs B or not."""
    rank = pointer(kinds.rank)
    types = {
        "shrink_ptr": rank,
        "b_ptr": pointer(kinds.factor),
        **rank_types(kinds),
        "left_ptr": rank,
        "right_ptr": rank if pack else None,
        "scaling": "fp32",
        **size_types(),
        **integers("stride_shrink"),
    }
    constants = {
        "BLOCK_M": blocks.reduce_lines,
        "BLOCK_R": block_of_places,
        "BLOCK_N": blocks.pack,
        "DEPENDENTS": kinds.pdl,
    }
    # A part of several adapters' S begins anywhere.
    aligned = kinds.aligned_names(("left_ptr", "right_ptr", "WIDTH"), ("b_ptr",))
    label = f"{kinds.label} r{block_of_places}{' pack' * pack}"
    # Four warps would put a few of 64 places' registers into memory on 9.0 and 10.0.
    warps = 8 if block_of_places > 32 else 4
    return Variant(precomputed_shrink, types, constants, aligned=aligned, options=options(warps, 1), label=label)
