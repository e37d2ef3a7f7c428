"""What a case must do at least, over what this machine can do at most.

Peaks are measured once in a run and the best of many tries is kept: multiply-adds by square products of several sizes
in each dtype, the library's and those of `lora_linear` without ranks, and reading by summing float32 numbers: 256 MB
for the memory, and as much as fits into a quarter of the last-level cache. They are what anything here reaches, not
what a data sheet says, and a case that meets a faster moment can show more than 100 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import peftkernels
from bench import data, lineup
from bench.cases import LAYER, Case
from peftkernels.cli.load import ForeignLoad
from peftkernels.cli.timing import undisturbed

SIZES = (512, 1024, 2048)
READ_ELEMENTS = 64 << 20
ATTEMPTS = 3


@dataclass(frozen=True)
class Peaks:
    """flops: floating-point operations a second by dtype of computation; bytes read a second from memory and cache."""

    flops: dict[torch.dtype, float]
    memory: float
    cache: float


# A slow two-core machine, to plan with where nothing was measured.
ASSUMED = Peaks({torch.float32: 180e9, torch.bfloat16: 320e9}, 20e9, 60e9)


def measure_peaks(seconds: float = 0.4) -> Peaks:
    """Measure for `seconds` in each dtype, and as long for reading from each place.

    While other processes disturb it, it is measured again, up to ATTEMPTS times, and the best of each is kept.
    """
    best = Peaks({}, 0.0, 0.0)
    for _ in range(ATTEMPTS):
        with ForeignLoad() as load:
            found = _measure_once(seconds)
        flops = {dtype: max(rate, best.flops.get(dtype, 0.0)) for dtype, rate in found.flops.items()}
        best = Peaks(flops, max(found.memory, best.memory), max(found.cache, best.cache))
        if undisturbed(load.share):
            break
    return best


def _measure_once(seconds: float) -> Peaks:
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        for size in SIZES:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            no_A, no_B = a[:0], b[:, :0]
            products = (partial(torch.mm, a, b, out=out), partial(peftkernels.lora_linear, a, b, no_A, no_B))
            for product in products:
                best = max(best, 2 * size**3 / _fastest(product, seconds / len(SIZES) / len(products)))
        flops[dtype] = best
    return Peaks(flops, _reading(READ_ELEMENTS, seconds), _reading(data.last_level_cache() // 16, seconds))


def _reading(elements: int, seconds: float) -> float:
    numbers = torch.ones(elements)
    return 4 * elements / _fastest(lambda: numbers.sum(), seconds)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    call()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


@dataclass(frozen=True)
class Work:
    """Floating-point operations that must be done, and bytes that must move: each input and each output once.

    A weight that fits into half of the last-level cache stays there between calls and counts as `cached`; inputs rotate
    and outputs are new, these are `moved`.
    """

    flops: float
    moved: float
    cached: float

    def seconds(self, dtype: torch.dtype, peaks: Peaks) -> float:
        """The least time it can take: the larger of the two."""
        return max(self.flops / peaks.flops[dtype], self.moved / peaks.memory + self.cached / peaks.cache)


def work(case: Case, contestant: str) -> Work:
    """What a layer's contestant has to do; DEAD ranks are no work, PROBE ranks are only where the gate has a gradient.

    - forward: 2·M·N·K + 2·M·r·(K + N) operations; x, W, bias, A, B and y
    - backward: 2·M·N·K for ∂x and 4·M·r·(K + N) for H, ∂A, ∂B and the adapter's part of ∂x; G, W, x, A, B, ∂x, ∂A, ∂B
    """
    m, n, k = case.M, case.N, case.K
    wide, narrow = (dtype.itemsize for dtype in data.dtypes(case))
    active, live = case.active_ranks, case.live_ranks
    if contestant == lineup.HALF_RANK:
        active = live = case.r // 2
    if contestant == lineup.FROZEN:
        active = live = 0
    bias = n if case.bias else 0
    # Without a gradient of the gate PROBE ranks have no part in the result.
    forward_ranks = live if case.trains else active
    flops = 2 * m * n * k + 2 * m * (forward_ranks * k + active * n)
    moved = wide * (m * k + m * n)
    frozen = wide * (n * k + bias) + narrow * (forward_ranks * k + active * n)
    if case.trains:
        # H of every live rank for the gate's gradient; ∂A, ∂B and the part of ∂x of the ACTIVE ones.
        flops += 2 * m * n * k + 2 * m * (live * n + active * (2 * k + n))
        reads_x = m * k if live else 0
        moved += wide * (m * n + reads_x + m * k)
        frozen += wide * n * k + narrow * 2 * live * (n + k)
    fits = wide * n * k <= data.last_level_cache() // 2
    return Work(flops, moved, frozen) if fits else Work(flops, moved + frozen, 0.0)


def percent(case: Case, contestant: str, seconds: float, peaks: Peaks) -> float | None:
    """The least time over the time it took, in percent; None for anything but a layer."""
    if case.operator != LAYER:
        return None
    return 100 * work(case, contestant).seconds(data.dtypes(case)[0], peaks) / seconds
