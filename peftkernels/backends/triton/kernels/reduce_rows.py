"""Splits of S or H added in order, and the result written where it belongs."""

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes, rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, pack_rows, store_by_rank
from peftkernels.backends.triton.common.sums import added_slots
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def reduce_rows(
    slots_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, shrink_ptr, left_ptr, a_ptr, right_ptr,
    scaling, M, N, K, r, WIDTH, slots,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Add the parts of S or H in fp32, as it is saved and as the next product takes it, and pack A.

    Grid: row blocks × blocks of places; then, where right_ptr is there, column blocks of A.

    Args:
        slots_ptr: The parts, fp32 (slots, M, WIDTH); the launch before this one writes them.
        order_ptr … scaling_ptr: `AdapterArguments.ranks`.
        shrink_ptr: S (M, r) in the order of the factors, fp32 beside float16 and else in x's dtype; written, or None.
        left_ptr: The sum times scaling·ĝ (M, WIDTH), compact, in the same dtype; written, or None.
        a_ptr: A (r, K), or None.
        right_ptr: A's ACTIVE rows (WIDTH, K), in the dtype of left; written, or None.
        scaling: The scaling where it is no tensor.
        M … WIDTH: `Sizes`.
        slots: How many parts there are.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    reducing = tl.cdiv(M, BLOCK_M) * place_blocks
    if program < reducing:
        n_active, n_live = active_and_live(counts_ptr, r)
        rows = (program // place_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        sums = added_slots(slots_ptr, slots, rows, places, M, WIDTH, n_live)
        store_by_rank(
            sums, shrink_ptr, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
            n_active, n_live,
        )  # fmt: skip
    elif right_ptr is not None:
        pack_rows(program - reducing, a_ptr, right_ptr, order_ptr, counts_ptr, K, r, WIDTH, BLOCK_K)


def launch(
    variant: Variant,
    programs: int,
    slots: Tensor,
    adapter: AdapterArguments,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: Sizes,
) -> None:
    """Launch `reduce_rows`; results: S as it is saved, the compact operand, A's packed rows, each or None."""
    saved, left, right = results
    variant(
        programs, slots, *adapter.ranks, saved, left, None if right is None else adapter.lora_A, right,
        adapter.numbers.scaling, *sizes, slots.shape[0],
    )  # fmt: skip


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, keep: bool, left: bool, pack: bool) -> Variant:
    """`reduce_rows` that writes S (keep), the compact operand (left) and A's packed rows (pack)."""
    rank = pointer(kinds.rank)
    types = {
        "slots_ptr": "*fp32",
        **rank_types(kinds),
        "shrink_ptr": rank if keep else None,
        "left_ptr": rank if left else None,
        "a_ptr": pointer(kinds.factor) if pack else None,
        "right_ptr": rank if pack else None,
        "scaling": "fp32",
        **size_types(),
        **integers("slots"),
    }
    constants = {
        "BLOCK_M": blocks.reduce_lines,
        "BLOCK_R": block_of_places,
        "BLOCK_K": blocks.pack,
        "OVERLAPS": kinds.pdl,
    }
    own = ("slots_ptr", "shrink_ptr", "left_ptr", "right_ptr", "WIDTH")
    return Variant(
        reduce_rows,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("a_ptr", "K")),
        options=options(4, 1, kinds.pdl),
        awaited=("slots_ptr",),
        label=f"{kinds.label} r{block_of_places}{' keep' * keep}{' left' * left}{' pack' * pack}",
    )
