"""Splits of ∂A and parts of ∂gate added in order."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes, plan_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, rank_at
from peftkernels.backends.triton.common.sums import added_lines, added_slots
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def reduce_grad_A(
    slots_ptr, gate_parts_ptr, order_ptr, counts_ptr, scaling_ptr, grad_ptr, grad_gate_ptr,
    scaling, M, N, K, r, WIDTH, slots, gate_parts,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """∂A, and ∂gate by the programs of the first columns; both in fp32.

    Grid: column blocks of x (one without grad) × blocks of places.

    Args:
        slots_ptr: The parts of ∂A, fp32 (slots, K, WIDTH), or None without grad.
        gate_parts_ptr: What `reduce_grad_B` wrote, fp32 (gate_parts, WIDTH), or None without grad_gate.
        order_ptr, counts_ptr: The plan, or None.
        scaling_ptr: One float, or None.
        grad_ptr: ∂A (r, K) in A's dtype, zeros for ranks that are not ACTIVE; written, or None.
        grad_gate_ptr: ∂gate (r,) in the gate's dtype, zeros for DEAD ranks; written, or None.
        scaling: The scaling where it is no tensor.
        M … WIDTH: `Sizes`.
        slots: How many parts of ∂A there are.
        gate_parts: How many parts of ∂gate there are.
    """
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


def launch(
    variant: Variant,
    programs: int,
    parts: tuple[Tensor | None, Tensor | None],
    adapter: AdapterArguments,
    results: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
) -> None:
    """Launch `reduce_grad_A`; parts: of ∂A and of ∂gate, each or None; results: ∂A and ∂gate, each or None."""
    slots, gate_parts = (0 if part is None else part.shape[0] for part in parts)
    variant(
        programs,
        *parts,
        adapter.order,
        adapter.counts,
        adapter.scaling_tensor,
        *results,
        adapter.numbers.scaling,
        *sizes,
        slots,
        gate_parts,
    )


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, grad: bool, gate: bool) -> Variant:
    """`reduce_grad_A` that writes ∂A (grad) and ∂gate (gate)."""
    types = {
        "slots_ptr": "*fp32" if grad else None,
        "gate_parts_ptr": "*fp32" if gate else None,
        **plan_types(kinds),
        "scaling_ptr": pointer(kinds.scaling),
        "grad_ptr": pointer(kinds.factor) if grad else None,
        "grad_gate_ptr": pointer(kinds.gate) if gate else None,
        "scaling": "fp32",
        **size_types(),
        **integers("slots", "gate_parts"),
    }
    constants = {"BLOCK_K": blocks.reduce_lines, "BLOCK_R": block_of_places, "BLOCK_PARTS": 32}
    return Variant(
        reduce_grad_A,
        types,
        constants,
        aligned=kinds.aligned_names(("slots_ptr", "gate_parts_ptr", "grad_ptr", "grad_gate_ptr", "WIDTH"), ()),
        # Not one product may join an addition in one kernel and not in another.
        options={**options(4, 1), "enable_fp_fusion": False},
        label=f"{kinds.label} r{block_of_places}{' grad' * grad}{' gate' * gate}",
    )
