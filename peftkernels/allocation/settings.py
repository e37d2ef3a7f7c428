"""The arguments of AdaLoRA's allocator, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peftkernels.allocation.schedule import CubicSchedule


@dataclass(frozen=True)
class AdaLoraSettings:
    """What `AdaLoraAllocator` was given; its docstring says what each means.

    Raises TypeError or ValueError naming the argument, what was found and what was expected.
    """

    total_step: int
    target_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    exact_budget: bool
    compact: bool

    def __post_init__(self) -> None:
        for name, lowest in (("total_step", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
            if value < lowest:
                raise ValueError(f"{name}: found {value}, expected at least {lowest}")
        for name in ("beta1", "beta2", "orth_reg_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a float")
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a number above 0 and below 1")
        if not (math.isfinite(self.orth_reg_weight) and self.orth_reg_weight >= 0):
            raise ValueError(f"orth_reg_weight: found {self.orth_reg_weight}, expected a finite number of at least 0")
        for name in ("exact_budget", "compact"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a bool")
        if self.last_allocation < 2:
            raise ValueError(
                f"tfinal: found {self.tfinal} with total_step={self.total_step}, expected at most total_step - 2, "
                "since ranks are chosen by the scores of the steps before step total_step - tfinal"
            )
        if self.tinit >= self.last_allocation:
            raise ValueError(
                f"tinit: found {self.tinit}, expected less than total_step - tfinal = {self.last_allocation}, "
                "so that there is a phase in which the budget decreases"
            )

    @property
    def last_allocation(self) -> int:
        """The step after which the ranks no longer change."""
        return self.total_step - self.tfinal

    def schedule(self, ranks: Mapping[str, int]) -> CubicSchedule:
        """The schedule for layers of these initial ranks. Raises ValueError unless target_r is below all of them."""
        smallest = min(ranks, key=lambda name: ranks[name])
        if self.target_r >= ranks[smallest]:
            raise ValueError(
                f"target_r: found {self.target_r}, expected less than the smallest initial rank, "
                f"{ranks[smallest]} of layer {smallest!r}"
            )
        return CubicSchedule(
            initial_budget=sum(ranks.values()),
            final_budget=self.target_r * len(ranks),
            tinit=self.tinit,
            last_allocation=self.last_allocation,
            deltaT=self.deltaT,
        )
