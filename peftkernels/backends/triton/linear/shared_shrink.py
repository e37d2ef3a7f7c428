"""S of several adapters that read one x: their factors side by side, one launch of the shrink."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant, multiprocessors
from peftkernels.backends.triton.common.operands import device_guard, is_aligned, kinds_of, rows_of
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import blocks_for
from peftkernels.backends.triton.kernels import reduce_rows, shrink
from peftkernels.ops.call import Shrink
from peftkernels.ops.rules import rank_dtype


@dataclass(frozen=True)
class Parts:
    """How the programs of a shrink share out x: row blocks × splits of K × blocks of places.

    Attributes:
        places: Places that a program holds.
        split: How K is split; where it has several parts they lie in slots, and `reduce_rows` follows.
        programs: The grid of the shrink.
        reduce_places: Places that a program of `reduce_rows` holds.
        reduce_programs: The grid of `reduce_rows`.
    """

    places: int
    split: shrink.Split
    programs: int
    reduce_places: int
    reduce_programs: int


def parts_of(kinds: Kinds, device: torch.device, m: int, k: int, r: int) -> Parts:
    """Enough programs for the device: K is split where M alone gives too few."""
    blocks = blocks_for(kinds.x, INTERPRETED)
    places = block_of_places(r, blocks.shrink_places)
    row_blocks = -(-m // blocks.shrink_rows)
    wanted = blocks.shrink_spread * multiprocessors(device) // row_blocks
    most = -(-k // (blocks.fewest_steps * blocks.shrink_depth))
    splits = max(1, min(wanted, most))
    chunk = -(-k // (splits * blocks.shrink_depth)) * blocks.shrink_depth
    splits = -(-k // chunk)
    reducing = block_of_places(r, blocks.reduce_places)
    return Parts(
        places,
        shrink.Split(splits, chunk),
        row_blocks * splits * -(-width(r) // places),
        reducing,
        -(-m // blocks.reduce_lines) * -(-width(r) // reducing),
    )


@functools.lru_cache(maxsize=1024)
def _plan(kinds: Kinds, device: torch.device, m: int, k: int, r: int) -> tuple[Parts, Variant, Variant | None]:
    blocks, parts = blocks_for(kinds.x, INTERPRETED), parts_of(kinds, device, m, k, r)
    split = parts.split.splits > 1
    making = shrink.variant(kinds, blocks, parts.places, True, False, split, False)
    return parts, making, reduce_rows.variant(kinds, blocks, parts.reduce_places, True, False, False) if split else None


def lora_shrink(call: Shrink) -> Tensor:
    """S (M, Σr)."""
    x, factors = call
    with device_guard(x):
        # The widest dtype of all factors, as HF peft's are of one; each is rounded in the kernel.
        adapter = AdapterArguments(factors[0].contiguous() if len(factors) == 1 else torch.cat(list(factors)))
        r, k = adapter.lora_A.shape
        m = x.shape[:-1].numel()
        if not (m and k and r):
            return x.new_zeros((m, r), dtype=rank_dtype(x.dtype))
        rows = rows_of(x)
        aligned = is_aligned((rows, adapter.lora_A), k | rows.stride(0))
        kinds = kinds_of(rows, adapter, None, aligned)
        parts, making, reducing = _plan(kinds, x.device, m, k, r)
        sizes = Sizes(m, 0, k, r, width(r))
        saved = x.new_empty((m, r), dtype=kinds.rank)
        if reducing is None:
            shrink.launch(making, parts.programs, rows, adapter, shrink.Outputs(shrink=saved), sizes, parts.split)
            return saved
        slots = rows.new_empty((parts.split.splits, m, sizes.width), dtype=torch.float32)
        shrink.launch(making, parts.programs, rows, adapter, shrink.Outputs(slots=slots), sizes, parts.split)
        reduce_rows.launch(reducing, parts.reduce_programs, slots, adapter, (saved, None, None), sizes)
        return saved
