"""S of several adapters that read one x: their factors side by side, one launch of the shrink."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant, multiprocessors
from peftkernels.backends.triton.common.operands import is_aligned, kinds_of, place, rows_of
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import blocks_for
from peftkernels.backends.triton.kernels import reduce_rows, shrink
from peftkernels.ops.call import Shrink
from peftkernels.ops.rules import rank_dtype


@dataclass(frozen=True)
class Parts:
    """How the programs of a shrink share out x: row blocks × splits of K × blocks of places.

    splits > 1: the parts lie in slots, and `finish` follows, in `finish_programs` programs.
    """

    places: int
    splits: int
    chunk: int
    programs: int
    finish_places: int
    finish_programs: int


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
    finishing = block_of_places(r, blocks.reduce_places)
    return Parts(
        places,
        splits,
        chunk,
        row_blocks * splits * -(-width(r) // places),
        finishing,
        -(-m // blocks.finish_rows) * -(-width(r) // finishing),
    )


@functools.lru_cache(maxsize=1024)
def _plan(kinds: Kinds, device: torch.device, m: int, k: int, r: int) -> tuple[Parts, Variant, Variant | None]:
    blocks, parts = blocks_for(kinds.x, INTERPRETED), parts_of(kinds, device, m, k, r)
    split = parts.splits > 1
    making = shrink.variant(kinds, blocks, parts.places, True, False, split, False)
    return parts, making, reduce_rows.variant(kinds, blocks, parts.finish_places, True, False, False) if split else None


def lora_shrink(call: Shrink) -> Tensor:
    """S (M, Σr)."""
    x, lora_A = call
    with place(x):
        # The widest dtype of all factors, as HF peft's are of one; each is rounded in the kernel.
        factors = lora_A[0].contiguous() if len(lora_A) == 1 else torch.cat(list(lora_A))
        r, k = factors.shape
        m = x.shape[:-1].numel()
        if not (m and k and r):
            return x.new_zeros((m, r), dtype=rank_dtype(x.dtype))
        rows = rows_of(x)
        aligned = is_aligned((rows, factors), k, rows.stride(0))
        kinds = kinds_of(rows, factors, None, None, None, None, None, aligned)
        parts, making, finishing = _plan(kinds, x.device, m, k, r)
        saved = x.new_empty((m, r), dtype=kinds.rank)
        slots = None if finishing is None else rows.new_empty((parts.splits, m, width(r)), dtype=torch.float32)
        making(
            parts.programs,
            rows,
            factors,
            None,
            None,
            None,
            None,
            None,
            None,
            saved if finishing is None else None,
            None,
            slots,
            None,
            1.0,
            1.0,
            0,
            m,
            0,
            k,
            r,
            width(r),
            rows.stride(0),
            parts.splits,
            parts.chunk,
        )
        if finishing is not None:
            finishing(
                parts.finish_programs,
                slots,
                None,
                None,
                None,
                None,
                saved,
                None,
                None,
                None,
                1.0,
                m,
                k,
                r,
                width(r),
                parts.splits,
            )
        return saved
