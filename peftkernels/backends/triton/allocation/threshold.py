"""Which ranks a budget keeps, decided on the device: a radix select in one program.

The rule is that of `select_ranks`. Scores become unsigned keys in the same order; four passes over them each settle
eight bits of the key of the (b0 - budget)-th smallest, by counting how many keys with the bits so far have which next
eight; a last pass compares. Scores are read five times from the cache: a few µs for thousands of ranks, computed, not
measured. NaN, which has no place in an order, does not occur: the averages take in nothing that is not finite, they are
never negative, and sums and products of such numbers are numbers or +∞.
"""

import functools

import torch
import triton
import triton.language as tl

from peftkernels.backends.triton.common.launch import Variant, options

# Scores that the program holds at a time.
SCORES = 2048


@triton.jit
def ordered_key(score):
    """fp32 as uint32 in the same order; -0 counts as 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    return tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def score_of_key(key):
    """The fp32 number of which this is the `ordered_key`."""
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def keys_at(scores_ptr, start, count, SCORES: tl.constexpr):
    """Keys of some scores, where they lie, and which there are."""
    places = start + tl.arange(0, SCORES)
    inside = places < count
    return ordered_key(tl.load(scores_ptr + places, mask=inside, other=0.0)), places, inside


@triton.jit
def keep_above_threshold(
    scores_ptr, budget_ptr, keep_ptr, threshold_ptr, budget, count, EXACT: tl.constexpr, SCORES: tl.constexpr
):
    """Which ranks a budget keeps.

    Grid: one program.

    Args:
        scores_ptr: fp32 (count,).
        budget_ptr: One int32 or int64, the budget on the device; or None.
        keep_ptr: u8 (count,), 1 where a rank is kept; written.
        threshold_ptr: One fp32; written.
        budget: The budget where it is a number.
        count: How many scores there are.
    """
    if budget_ptr is not None:
        # More than all, or less than none, is all or none.
        budget = tl.minimum(tl.maximum(tl.load(budget_ptr), 0), count).to(tl.int32)
    # How many keys with the bits so far are masked, counted from the smallest.
    masked = count - budget
    wanted = masked
    digits = tl.arange(0, 256)
    prefix = tl.zeros((), tl.uint32)
    ties = tl.zeros((), tl.int32)
    for step in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, count, SCORES):
            keys, _, inside = keys_at(scores_ptr, start, count, SCORES)
            if step > 0:
                inside = inside & ((keys >> (32 - 8 * step)) == prefix)
            counts += tl.histogram(((keys >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=inside)
        # The first digit up to which there are enough.
        digit = tl.minimum(tl.sum((tl.cumsum(counts, 0) < wanted).to(tl.int32), 0), 255)
        wanted -= tl.sum(tl.where(digits < digit, counts, 0), 0)
        ties = tl.sum(tl.where(digits == digit, counts, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    threshold = tl.where(masked > 0, score_of_key(prefix), float("-inf"))
    tl.store(threshold_ptr, threshold)
    # Of those that tie with the threshold the first stay, as many as make up the budget.
    spared = ties - wanted
    before = tl.zeros((), tl.int32)
    for start in range(0, count, SCORES):
        keys, places, inside = keys_at(scores_ptr, start, count, SCORES)
        keep = keys > prefix
        if EXACT:
            tied = (inside & (keys == prefix)).to(tl.int32)
            place = before + tl.cumsum(tied, 0) - tied
            keep = keep | ((tied != 0) & (place < spared))
            before += tl.sum(tied, 0)
        keep = tl.where(masked > 0, keep, True)
        tl.store(keep_ptr + places, keep.to(tl.uint8), mask=inside)


@functools.cache
def variant(exact: bool, budget: torch.dtype | None) -> Variant:
    """With ties kept up to the budget or all masked; the budget a tensor of this dtype, or a number."""
    integer = {None: None, torch.int64: "*i64", torch.int32: "*i32"}[budget]
    types = {
        "scores_ptr": "*fp32",
        "budget_ptr": integer,
        "keep_ptr": "*u8",
        "threshold_ptr": "*fp32",
        "budget": "i32",
        "count": "i32",
    }
    label = f"{'exact' if exact else 'ties masked'}{f' budget {integer}' if integer else ''}"
    return Variant(
        keep_above_threshold,
        types,
        {"EXACT": exact, "SCORES": SCORES},
        options=options(16, 1),
        label=label,
    )
