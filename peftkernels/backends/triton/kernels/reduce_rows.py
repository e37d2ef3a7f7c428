"""Splits of S or H added in order, and the result written where it belongs."""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer, rank_arguments
from peftkernels.backends.triton.common.ranks import active_and_live, pack_rows, store_by_rank
from peftkernels.backends.triton.common.sums import added_slots
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def finish_rows(
    slots_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, shrink_ptr, left_ptr, a_ptr, right_ptr,
    scaling, M, K, r, WIDTH, slots,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """S or H from its slots, as it is saved and as the next product takes it; then programs that pack A's rows."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    finishing = tl.cdiv(M, BLOCK_M) * place_blocks
    if program < finishing:
        n_active, n_live = active_and_live(counts_ptr, r)
        rows = (program // place_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        sums = added_slots(slots_ptr, slots, rows, places, M, WIDTH, n_live)
        store_by_rank(
            sums, shrink_ptr, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
            n_active, n_live,
        )  # fmt: skip
    elif right_ptr is not None:
        pack_rows(program - finishing, a_ptr, right_ptr, order_ptr, counts_ptr, K, r, WIDTH, BLOCK_K)


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, keep: bool, left: bool, pack: bool) -> Variant:
    """`finish_rows` that writes S (keep), the compact operand (left) and A's packed rows (pack)."""
    rank = pointer(kinds.rank)
    types = {
        "slots_ptr": "*fp32",
        **rank_arguments(kinds),
        "shrink_ptr": rank if keep else None,
        "left_ptr": rank if left else None,
        "a_ptr": pointer(kinds.factor) if pack else None,
        "right_ptr": rank if pack else None,
        "scaling": "fp32",
        **integers("M", "K", "r", "WIDTH", "slots"),
    }
    constants = {
        "BLOCK_M": blocks.finish_rows,
        "BLOCK_R": block_of_places,
        "BLOCK_K": blocks.pack,
        "OVERLAPS": kinds.pdl,
    }
    own = ("slots_ptr", "shrink_ptr", "left_ptr", "right_ptr", "WIDTH")
    return Variant(
        finish_rows,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("a_ptr", "K")),
        options=options(4, 1, kinds.pdl),
        awaited=("slots_ptr",),
        label=f"{kinds.label} r{block_of_places}{' keep' * keep}{' left' * left}{' pack' * pack}",
    )
