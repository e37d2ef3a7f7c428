"""The arguments of allocators, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peftkernels.allocation.budget.budgets import Budget, Shares, share_out
from peftkernels.allocation.checks import check_float, check_smoothing

DEFAULT_TARGET_R = 8


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """What `BudgetAllocator` was given; its docstring says what each means.

    Raises:
        TypeError: Naming the argument, what was found and what was expected.
        ValueError: Likewise.
    """

    total_step: int
    target_r: int | None = None
    budget: Budget | None = None
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    orth_reg_weight: float = 0.0
    exact_budget: bool = False
    compact: bool = False
    capturable: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None:
            if not isinstance(self.budget, Budget):
                raise TypeError(f"budget: found {type(self.budget).__name__}, expected a peftkernels.allocation.Budget")
            if self.target_r is not None:
                raise ValueError(f"target_r: found {self.target_r} beside a budget, expected one of the two")
        elif self.target_r is None:
            object.__setattr__(self, "target_r", DEFAULT_TARGET_R)
        for name, lowest in (("total_step", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            if name == "target_r" and self.budget is not None:
                continue
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
            if value < lowest:
                raise ValueError(f"{name}: found {value}, expected at least {lowest}")
        check_float("orth_reg_weight", self.orth_reg_weight)
        if not (math.isfinite(self.orth_reg_weight) and self.orth_reg_weight >= 0):
            raise ValueError(f"orth_reg_weight: found {self.orth_reg_weight}, expected a finite number of at least 0")
        for name in ("exact_budget", "compact", "capturable"):
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
        if self.capturable and self.compact:
            raise ValueError(
                "compact: found True with capturable=True, expected False: a captured step cannot tell the host that "
                "the last allocation is done"
            )

    @property
    def last_allocation(self) -> int:
        """The step after which the ranks no longer change."""
        return self.total_step - self.tfinal

    def share_out(self, layers: Mapping[str, tuple[int, int, int]], costs: Mapping[str, float] | None) -> Shares:
        """Return the budget bound to layers.

        Args:
            layers: (r, N, K) by name.
            costs: Cost of one rank by layer name, for a budget in microseconds or bytes.

        Raises:
            ValueError: Where it leaves nothing to prune.
        """
        budget = self.budget
        if budget is None:
            assert self.target_r is not None
            smallest = min(layers, key=lambda name: layers[name][0])
            if self.target_r >= layers[smallest][0]:
                raise ValueError(
                    f"target_r: found {self.target_r}, expected less than the smallest initial rank, "
                    f"{layers[smallest][0]} of layer {smallest!r}"
                )
            budget = Budget(self.target_r * len(layers))
        return share_out(
            budget,
            layers,
            tinit=self.tinit,
            last_allocation=self.last_allocation,
            deltaT=self.deltaT,
            costs=costs,
        )


@dataclass(frozen=True, kw_only=True)
class AdaLoraSettings(AllocatorSettings):
    """What `AdaLoraAllocator` was given; its docstring says what each means."""

    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            check_smoothing(name, getattr(self, name))
        super().__post_init__()
