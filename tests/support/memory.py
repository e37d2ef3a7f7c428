"""Uninitialised memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MEBI = 2**20


@contextmanager
def poison(device: torch.device) -> Iterator[None]:
    """In the block, what `torch.empty` returns is NaN in every floating-point dtype.

    On the CPU torch fills it. On a GPU its allocator is handed blocks of ones' bits, small and large, which it cuts up
    again: enough for what tests of a few hundred megabytes ask for at once.
    """
    if device.type == "cpu":
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    sizes = [_MEBI // 2] * 64 + [512 * _MEBI] * 4
    filled = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
    del filled
    yield
