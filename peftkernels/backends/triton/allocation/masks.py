"""A decision written down: gates of masked ranks zeroed, and every layer's plan, one program a layer, one launch.

Of a layer with r ranks it reads r bytes and writes some 9·r + 8 more: nothing beside the launch itself.
"""

import functools

import triton
import triton.language as tl

from peftkernels.backends.triton.common.launch import Variant, options

# Numbers of a layer in the table of layers.
LAYER_FIELDS = 4


@triton.jit
def write_masks(
    layers_ptr, addresses_ptr, keep_ptr, mask_now_ptr, layers, masked_state, ACTIVE: tl.constexpr, RANKS: tl.constexpr
):
    """Zero the gates of masked ranks, and write every layer's plan.

    Grid: layers.

    Args:
        layers_ptr: int64 (layers, 4): first rank, r, 16-bit words of an element of the gate.
        addresses_ptr: int64 (4 · layers,): of all gates (16 or 32 bits), states (u8), orders (i32) and counts (i32);
            what lies there is written.
        keep_ptr: u8 (Σ r,), 1 where a rank stays.
        mask_now_ptr: One u8, or None; where 0 the gates stay and every rank is ACTIVE.
        layers: How many layers there are.
        masked_state: The state of a masked rank, PROBE or DEAD.
    """
    layer = tl.program_id(0)
    fields = layers_ptr + layer * 4
    keep_ptr += tl.load(fields)
    r = tl.load(fields + 1).to(tl.int32)
    words = tl.load(fields + 2).to(tl.int32)
    gate_ptr = tl.load(addresses_ptr + layer).to(tl.pointer_type(tl.int16))
    state_ptr = tl.load(addresses_ptr + layers + layer).to(tl.pointer_type(tl.uint8))
    order_ptr = tl.load(addresses_ptr + 2 * layers + layer).to(tl.pointer_type(tl.int32))
    counts_ptr = tl.load(addresses_ptr + 3 * layers + layer).to(tl.pointer_type(tl.int32))
    ranks = tl.arange(0, RANKS)
    inside = ranks < r
    active = tl.load(keep_ptr + ranks, mask=inside, other=0) != 0
    if mask_now_ptr is not None:
        active = tl.where(tl.load(mask_now_ptr) == 0, inside, active)
    masked = inside & ~active
    # Zero is zero bits in every dtype.
    for word in range(words):
        tl.store(gate_ptr + ranks * words + word, tl.zeros((RANKS,), tl.int16), mask=masked)
    state = tl.where(active, ACTIVE, masked_state)
    tl.store(state_ptr + ranks, state.to(tl.uint8), mask=inside)
    counted = active.to(tl.int32)
    n_active = tl.sum(counted, 0)
    # Both kinds in ascending order, the ACTIVE ones first.
    earlier = tl.cumsum(counted, 0) - counted
    place = tl.where(active, earlier, n_active + ranks - earlier)
    tl.store(order_ptr + place, ranks, mask=inside)
    tl.store(counts_ptr, n_active)
    # A masked rank is PROBE, and live, or DEAD, which is 0.
    tl.store(counts_ptr + 1, tl.where(masked_state != 0, r, n_active))


@functools.cache
def variant(ranks: int, mask_now: bool, active: int) -> Variant:
    """For layers of up to `ranks` ranks, a power of two; active: the number of the state ACTIVE."""
    types = {
        "layers_ptr": "*i64",
        "addresses_ptr": "*i64",
        "keep_ptr": "*u8",
        "mask_now_ptr": "*u8" if mask_now else None,
        "layers": "i32",
        "masked_state": "i32",
    }
    constants = {"ACTIVE": active, "RANKS": ranks}
    return Variant(write_masks, types, constants, options=options(1, 1), label=f"r{ranks}{' mask_now' * mask_now}")
