"""Slots added in order, and the results written where they belong. The order does not depend on timing."""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import Variant, integers, options, pointer, rank_arguments
from peftkernels.backends.triton.ranks import active_and_live, pack_rows, rank_at, scaled_gate, store_by_rank
from peftkernels.backends.triton.tiles import Blocks

# Places that a program holds.
MOST_PLACES = 128


@triton.jit
def added_slots(slots_ptr, slots, lines, places, LINES, WIDTH, n_live):
    """Σ over slots of fp32 (slots, LINES, WIDTH) at some lines and live places."""
    inside = (lines < LINES)[:, None] & (places < n_live)[None, :]
    offsets = lines.to(tl.int64)[:, None] * WIDTH + places[None, :]
    sums = tl.zeros((lines.shape[0], places.shape[0]), tl.float32)
    # Four loads in flight: a slot by itself is far too little to wait for.
    for slot in tl.range(0, slots, loop_unroll_factor=4):
        base = slots_ptr + tl.cast(slot, tl.int64) * LINES * WIDTH
        sums += tl.load(base + offsets, mask=inside, other=0.0)
    return sums


@triton.jit
def added_lines(values):
    """Σ over the first dimension, as one tree of additions.

    `tl.sum` adds in an order that depends on how values lie in registers, and so on how many places there are: a rank
    would not have the bits that it has once DEAD ones are cut out.
    """
    for _ in tl.static_range(10):
        if values.shape[0] > 1:
            halves = tl.reshape(values, (2, values.shape[0] // 2, values.shape[1]))
            first, second = tl.split(tl.permute(halves, (1, 2, 0)))
            values = first + second
    return tl.reshape(values, (values.shape[1],))


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


@triton.jit
def finish_grad_B(
    slots_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, grad_ptr, gate_parts_ptr,
    scaling, N, r, WIDTH, slots,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """∂B (N, r) = scaling·ĝ·Gᵀ·S, zeros for ranks that are not ACTIVE, and a part of ∂gate from each column block of B.

    gate_parts fp32 (⌈N / BLOCK_N⌉, WIDTH): Σ over the block's columns of B·(Gᵀ·S), for live ranks.
    """
    n_active, n_live = active_and_live(counts_ptr, r)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    block = tl.program_id(0) // place_blocks
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    places = (tl.program_id(0) % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    ranks = rank_at(order_ptr, places, r)
    sums = added_slots(slots_ptr, slots, columns, places, N, WIDTH, n_live)
    offsets = columns.to(tl.int64)[:, None] * r + ranks[None, :]
    inside = (columns < N)[:, None]
    if grad_ptr is not None:
        factor = scaled_gate(gate_ptr, scaling_ptr, scaling, ranks, places, n_active)
        grad = tl.where((places < n_active)[None, :], sums * factor[None, :], 0.0)
        tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside & (places < r)[None, :])
    if gate_parts_ptr is not None:
        b = tl.load(b_ptr + offsets, mask=inside & (places < n_live)[None, :], other=0.0).to(tl.float32)
        part = added_lines(b * sums)
        tl.store(gate_parts_ptr + block.to(tl.int64) * WIDTH + places, part, mask=places < WIDTH)


@triton.jit
def finish_grad_A(
    slots_ptr, gate_parts_ptr, order_ptr, counts_ptr, scaling_ptr, grad_ptr, grad_gate_ptr,
    scaling, K, r, WIDTH, slots, gate_parts,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """∂A (r, K), zeros for ranks that are not ACTIVE; the programs of the first columns also add up ∂gate (r,)."""
    n_active, n_live = active_and_live(counts_ptr, r)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    program = tl.program_id(0)
    places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    ranks = rank_at(order_ptr, places, r)
    block = program // place_blocks
    if grad_ptr is not None:
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        sums = added_slots(slots_ptr, slots, columns, places, K, WIDTH, n_active)
        offsets = ranks.to(tl.int64)[None, :] * K + columns[:, None]
        inside = (columns < K)[:, None] & (places < r)[None, :]
        tl.store(grad_ptr + offsets, sums.to(grad_ptr.dtype.element_ty), mask=inside)
    if grad_gate_ptr is not None:
        if block == 0:
            scale = scaling
            if scaling_ptr is not None:
                scale = tl.load(scaling_ptr).to(tl.float32)
            gate = tl.zeros((BLOCK_R,), tl.float32)
            for first in range(0, gate_parts, BLOCK_PARTS):
                parts = first + tl.arange(0, BLOCK_PARTS)
                inside = (parts < gate_parts)[:, None] & (places < n_live)[None, :]
                offsets = parts.to(tl.int64)[:, None] * WIDTH + places[None, :]
                gate += added_lines(tl.load(gate_parts_ptr + offsets, mask=inside, other=0.0))
            grad = tl.where(places < n_live, gate * scale, 0.0)
            tl.store(grad_gate_ptr + ranks, grad.to(grad_gate_ptr.dtype.element_ty), mask=places < r)


@functools.cache
def rows_variant(kinds: Kinds, blocks: Blocks, block_of_places: int, keep: bool, left: bool, pack: bool) -> Variant:
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


@functools.cache
def grad_B_variant(kinds: Kinds, blocks: Blocks, block_of_places: int, grad: bool, gate: bool) -> Variant:
    """`finish_grad_B` that writes ∂B (grad) and the parts of ∂gate (gate)."""
    types = {
        "slots_ptr": "*fp32",
        "b_ptr": pointer(kinds.factor) if gate else None,
        **rank_arguments(kinds),
        "grad_ptr": pointer(kinds.factor) if grad else None,
        "gate_parts_ptr": "*fp32" if gate else None,
        "scaling": "fp32",
        **integers("N", "r", "WIDTH", "slots"),
    }
    constants = {"BLOCK_N": blocks.finish_rows, "BLOCK_R": block_of_places}
    return Variant(
        finish_grad_B,
        types,
        constants,
        aligned=kinds.aligned_names(("slots_ptr", "grad_ptr", "gate_parts_ptr", "WIDTH"), ("b_ptr",)),
        # Not one product may join an addition in one kernel and not in another.
        options={**options(4, 1), "enable_fp_fusion": False},
        label=f"{kinds.label} r{block_of_places}{' grad' * grad}{' gate' * gate}",
    )


@functools.cache
def grad_A_variant(kinds: Kinds, blocks: Blocks, block_of_places: int, grad: bool, gate: bool) -> Variant:
    """`finish_grad_A` that writes ∂A (grad) and ∂gate (gate)."""
    types = {
        "slots_ptr": "*fp32" if grad else None,
        "gate_parts_ptr": "*fp32" if gate else None,
        "order_ptr": "*i32" if kinds.plan else None,
        "counts_ptr": "*i32" if kinds.plan else None,
        "scaling_ptr": pointer(kinds.scaling),
        "grad_ptr": pointer(kinds.factor) if grad else None,
        "grad_gate_ptr": pointer(kinds.gate) if gate else None,
        "scaling": "fp32",
        **integers("K", "r", "WIDTH", "slots", "gate_parts"),
    }
    constants = {"BLOCK_K": blocks.finish_rows, "BLOCK_R": block_of_places, "BLOCK_PARTS": 32}
    return Variant(
        finish_grad_A,
        types,
        constants,
        aligned=kinds.aligned_names(("slots_ptr", "gate_parts_ptr", "grad_ptr", "grad_gate_ptr", "WIDTH"), ()),
        # Not one product may join an addition in one kernel and not in another.
        options={**options(4, 1), "enable_fp_fusion": False},
        label=f"{kinds.label} r{block_of_places}{' grad' * grad}{' gate' * gate}",
    )
