"""Philox4x32-10 in plain Python integers: a second opinion that shares no code with the package."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for step in range(10):
        if step > 0:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def kept(seed: int, p: float, rows: int, columns: int) -> Tensor:
    """Which elements of x, viewed as (rows, columns), dropout keeps: bool (rows, columns)."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words: list[int] = []
    for block in range((rows * columns + 3) // 4):
        words.extend(philox4x32_10((block & _WORD, block >> 32, 0, 0), key))
    threshold = round(p * 2**32)
    return torch.tensor([word >= threshold for word in words[: rows * columns]]).view(rows, columns)
