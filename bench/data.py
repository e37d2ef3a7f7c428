"""Random weights and inputs of a layer's case, shared between cases where they are large."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import DEAD, DTYPES, Case
from peftkernels import RankPlan, RankState
from peftkernels.functional.checks import adapter_of
from peftkernels.ops.call import Call

SCALING = 2.0
# More views of an input than this only cost Python's own memory; they are spread over the whole pool.
MOST_INPUTS = 4096
_USUAL_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Adapter:
    """The factors A (r, K) and B (N, r), and for an AdaLoRA layer its gate (r,) and the plan of its ranks."""

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    plan: RankPlan | None

    def trainable(self) -> tuple[Tensor, ...]:
        """The tensors that get a gradient."""
        return (self.lora_A, self.lora_B) if self.gate is None else (self.lora_A, self.lora_B, self.gate)

    def copy(self, trains: bool, dtype: torch.dtype | None = None) -> Adapter:
        """The same numbers in tensors of their own, which require grad where `trains`."""

        def own(value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(trains)

        return Adapter(own(self.lora_A), own(self.lora_B), None if self.gate is None else own(self.gate), self.plan)

    def double(self) -> Adapter:
        """The same numbers in float64."""
        return self.copy(False, torch.float64)

    def call_of(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> Call:
        """The call of `lora_linear` on this adapter."""
        adapter = adapter_of(self.lora_A, self.lora_B, self.gate, self.plan, SCALING, dropout_p, seed)
        return Call(x, weight, adapter, bias)

    def half(self) -> Adapter:
        """The first half of the ranks, all of them ACTIVE."""
        r = self.lora_A.shape[0] // 2
        gate = None if self.gate is None else self.gate[:r]
        return Adapter(self.lora_A[:r], self.lora_B[:, :r].contiguous(), gate, _plan(r, r, RankState.PROBE))

    def masked_gate(self) -> Tensor:
        """The gate, zero where a rank is not ACTIVE, as implementations without masks express it."""
        assert self.gate is not None and self.plan is not None
        return self.gate.where(self.plan.state == int(RankState.ACTIVE), 0)


def dtypes(case: Case) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of x and the weight, and that of the factors."""
    wide, factors = DTYPES[case.dtype]
    return getattr(torch, wide), getattr(torch, factors)


@functools.lru_cache(maxsize=1)
def frozen_weight(k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (N, K) from N(0, 1/K) and bias (N,) from N(0, 1); the last one made is kept."""
    generator = torch.Generator().manual_seed(31 * k + n)
    weight = torch.randn(n, k, generator=generator).mul_(k**-0.5).to(dtype)
    return weight, torch.randn(n, generator=generator).to(dtype)


def adapter(case: Case) -> Adapter:
    """A from N(0, 1/K), B from N(0, 0.1²), gates around 1; ACTIVE ranks are spread evenly over the ranks."""
    generator = torch.Generator().manual_seed(case.r)
    dtype = dtypes(case)[1]

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    lora_A = normal(case.r, case.K, scale=case.K**-0.5)
    lora_B = normal(case.N, case.r, scale=0.1)
    if not case.masking:
        return Adapter(lora_A, lora_B, None, None)
    gate = (1 + torch.randn(case.r, generator=generator) / 4).to(dtype)
    masked = RankState.DEAD if case.masking == DEAD else RankState.PROBE
    return Adapter(lora_A, lora_B, gate, _plan(case.r, case.active_ranks, masked))


def _plan(r: int, active: int, masked: RankState) -> RankPlan:
    state = torch.full((r,), int(masked), dtype=torch.uint8)
    state[[i * r // active for i in range(active)]] = int(RankState.ACTIVE)
    return RankPlan.from_state(state)


def inputs(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Sequence[Tensor]:
    """Views (rows, columns) of a pool of normal numbers twice the size of the last-level cache, and at least two."""
    size = rows * columns
    count = max(2, 2 * last_level_cache() // (size * dtype.itemsize))
    pool = _pool(1 << (count * size - 1).bit_length(), dtype, seed)
    kept = min(count, MOST_INPUTS)
    stride = count // kept * size
    return [pool[i * stride : i * stride + size].view(rows, columns) for i in range(kept)]


@functools.lru_cache(maxsize=2)
def _pool(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last_level_cache() -> int:
    """Bytes of the processor's last-level cache; 32 MiB where the system does not say."""
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        found = max(found, int(text[:-1] or 0) * unit)
    # A cloud machine may report the cache of a whole socket; inputs must fit in memory beside everything else.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 33
    return min(found or _USUAL_CACHE_BYTES, total // 64)
