"""Where reading a plan's counts would stall the device, eager masks ranks instead of gathering them: that path, here.

It needs no accelerator to compute, only to be chosen, so the factor A says that it lies on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import make_call
from support.checks import (
    CHECKS,
    contains_dead_ranks,
    contains_probe_ranks,
    follows_rank_states,
    propagates,
    within_budget,
)
from torch import Tensor

from peftkernels.backends.eager import serving as eager


class _Elsewhere:
    """A tensor on the CPU that claims another device until it is cast."""

    device = SimpleNamespace(type="elsewhere")

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.shape = value.shape

    def to(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype)


@pytest.fixture(autouse=True)
def _masked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gathering = eager._LiveRanks
    made: list[Any] = []

    def masking(adapter: Any, dtype: torch.dtype) -> Any:
        made.append(gathering(adapter._replace(lora_A=_Elsewhere(adapter.lora_A)), dtype))
        return made[-1]

    monkeypatch.setattr(eager, "_LiveRanks", masking)
    yield
    assert made, "eager ran without its masks"
    assert all(ranks.index is None for ranks in made), "eager gathered ranks"


# A masked rank is multiplied and not cut out: what agrees to the bit elsewhere agrees within rounding here.
BIT_FOR_BIT = ("masked equals sliced",)


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in BIT_FOR_BIT])
def test_every_check(check: str, seed: int) -> None:
    CHECKS[check]("eager", seed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
def test_within_budget(dtype: str, p: float, gate: bool, seed: int) -> None:
    within_budget(make_call(seed, leading=(3, 20), r=11, plan=True, dtype=dtype, dropout_p=p, gate=gate), "eager")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_masked_ranks_never_leak(poison: float, p: float, seed: int) -> None:
    call = make_call(seed, r=11, plan=True, dropout_p=p)
    contains_dead_ranks(call, "eager", poison)
    contains_probe_ranks(call, "eager", poison)
    follows_rank_states(call, "eager")


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "gate", "grad_y"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_nan_and_inf_propagate(name: str, poison: float, seed: int) -> None:
    propagates(make_call(seed, r=11, plan=True), "eager", name, poison)
