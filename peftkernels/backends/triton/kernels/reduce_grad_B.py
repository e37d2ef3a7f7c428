"""Splits of Gᵀ·S added in order: ∂B and the parts of ∂gate."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes, rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, rank_at, scaled_gate
from peftkernels.backends.triton.common.sums import added_lines, added_slots
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def reduce_grad_B(
    slots_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, grad_ptr, gate_parts_ptr,
    scaling, M, N, K, r, WIDTH, slots,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """∂B = scaling·ĝ·Gᵀ·S, and from each column block of G a part of ∂gate, Σ B·(Gᵀ·S); both in fp32.

    Grid: column blocks of G × blocks of places.

    Args:
        slots_ptr: The parts of Gᵀ·S, fp32 (slots, N, WIDTH).
        b_ptr: B (N, r), or None without gate_parts.
        order_ptr … scaling_ptr: `AdapterArguments.ranks`.
        grad_ptr: ∂B (N, r) in B's dtype, zeros for ranks that are not ACTIVE; written, or None.
        gate_parts_ptr: fp32 (⌈N / BLOCK_N⌉, WIDTH), for live ranks; written, or None.
        scaling: The scaling where it is no tensor.
        M … WIDTH: `Sizes`.
        slots: How many parts there are.
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


def launch(
    variant: Variant,
    programs: int,
    slots: Tensor,
    adapter: AdapterArguments,
    results: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
) -> None:
    """Launch `reduce_grad_B`; results: ∂B and the parts of ∂gate, each or None."""
    gate_parts = results[1]
    variant(
        programs, slots, None if gate_parts is None else adapter.lora_B, *adapter.ranks, *results,
        adapter.numbers.scaling, *sizes, slots.shape[0],
    )  # fmt: skip


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, grad: bool, gate: bool) -> Variant:
    """`reduce_grad_B` that writes ∂B (grad) and the parts of ∂gate (gate)."""
    types = {
        "slots_ptr": "*fp32",
        "b_ptr": pointer(kinds.factor) if gate else None,
        **rank_types(kinds),
        "grad_ptr": pointer(kinds.factor) if grad else None,
        "gate_parts_ptr": "*fp32" if gate else None,
        "scaling": "fp32",
        **size_types(),
        **integers("slots"),
    }
    constants = {"BLOCK_N": blocks.reduce_lines, "BLOCK_R": block_of_places}
    return Variant(
        reduce_grad_B,
        types,
        constants,
        aligned=kinds.aligned_names(("slots_ptr", "grad_ptr", "gate_parts_ptr", "WIDTH"), ("b_ptr",)),
        # Not one product may join an addition in one kernel and not in another.
        options={**options(4, 1), "enable_fp_fusion": False},
        label=f"{kinds.label} r{block_of_places}{' grad' * grad}{' gate' * gate}",
    )
