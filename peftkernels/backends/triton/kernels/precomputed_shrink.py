"""An S that the caller has already, as the GEMM's tail takes it: a launch that reads no x."""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer, rank_arguments
from peftkernels.backends.triton.common.ranks import active_and_live, pack_columns, rank_at, store_by_rank
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def place_given(
    given_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, left_ptr, right_ptr,
    scaling, M, N, r, WIDTH, stride_given,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """left (M, WIDTH) from given (M, r); then programs that pack B's columns where right is given."""
    if DEPENDENTS:
        # The GEMM may start its main loop: it waits for this launch to end just before its tail.
        gdc_launch_dependents()
    program = tl.program_id(0)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    placing = tl.cdiv(M, BLOCK_M) * place_blocks
    if program < placing:
        n_active, n_live = active_and_live(counts_ptr, r)
        rows = (program // place_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        ranks = rank_at(order_ptr, places, r)
        offsets = rows.to(tl.int64)[:, None] * stride_given + ranks[None, :]
        inside = (rows < M)[:, None] & (places < n_active)[None, :]
        values = tl.load(given_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        store_by_rank(
            values, None, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
            n_active, n_live,
        )  # fmt: skip
    elif right_ptr is not None:
        pack_columns(program - placing, b_ptr, right_ptr, order_ptr, counts_ptr, N, r, WIDTH, BLOCK_N)


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, pack: bool) -> Variant:
    """`place_given` that packs B or not."""
    rank = pointer(kinds.rank)
    types = {
        "given_ptr": rank,
        "b_ptr": pointer(kinds.factor),
        **rank_arguments(kinds),
        "left_ptr": rank,
        "right_ptr": rank if pack else None,
        "scaling": "fp32",
        **integers("M", "N", "r", "WIDTH", "stride_given"),
    }
    constants = {
        "BLOCK_M": blocks.finish_rows,
        "BLOCK_R": block_of_places,
        "BLOCK_N": blocks.pack,
        "DEPENDENTS": kinds.pdl,
    }
    # A part of several adapters' S begins anywhere.
    aligned = kinds.aligned_names(("left_ptr", "right_ptr", "WIDTH"), ("b_ptr",))
    label = f"{kinds.label} r{block_of_places}{' pack' * pack}"
    # Four warps would put a few of 64 places' registers into memory on 9.0 and 10.0.
    warps = 8 if block_of_places > 32 else 4
    return Variant(place_given, types, constants, aligned=aligned, options=options(warps, 1), label=label)
