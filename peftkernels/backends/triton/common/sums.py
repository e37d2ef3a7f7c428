"""Device code: sums taken in an order that does not depend on timing, nor on how values lie in registers."""

import triton
import triton.language as tl


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
