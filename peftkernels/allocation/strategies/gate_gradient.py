"""Allocation by the gradient of the gates: one number per rank, no memory traffic over the factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

RULES = ("product", "gradient")


class GateGradient(Strategy):
    """Score of a rank: the running mean of (e·∂e)² ("product") or of |∂e| ("gradient").

    - "product": v ← β·v + (1-β)·(e·∂e)²: since ⟨A_i, ∂A_i⟩ = ⟨B_i, ∂B_i⟩ = e_i·∂e_i for the task loss, this is
      first-order sensitivity of the loss to the whole rank, squared as in Taylor pruning (Molchanov et al., arXiv
      1906.10771)
    - "gradient": v ← β·v + (1-β)·|∂e|: also for gates that are zero, so masked ranks compete on equal terms

    The mean starts at zero without correction, which does not change the order of scores. Both rules are linear in the
    gradient before they are smoothed, so they are right under accumulation, clipping and data parallelism, where
    elementwise scores taken inside a backward pass would not be.

    Args:
        rule: "product" or "gradient".
        beta: Smoothing β, between 0 and 1.
        priorities: Factors above 0 on the scores of the modules that a shell pattern matches, such as
            {"*.v_proj": 2.0}; where several do, their product.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    name = "gate"
    capturable = True

    def __init__(
        self, rule: str = "product", beta: float = 0.85, priorities: Mapping[str, float] | None = None
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule: found {rule!r}, expected one of {', '.join(RULES)}")
        check_smoothing("beta", beta)
        for pattern, priority in (priorities or {}).items():
            if not (isinstance(priority, (int, float)) and math.isfinite(priority) and priority > 0):
                raise ValueError(f"priorities[{pattern!r}]: found {priority!r}, expected a finite number above 0")
        self.rule = rule
        self.beta = beta
        self.priorities = dict(priorities or {})

    def begin(self, statistics: Statistics) -> None:
        self._average = torch.zeros(statistics.total, dtype=statistics.dtype, device=statistics.device)
        unmatched = [
            pattern for pattern in self.priorities if not any(fnmatchcase(name, pattern) for name in statistics.names)
        ]
        if unmatched:
            raise ValueError(
                f"priorities: found no module for {unmatched[0]!r}; modules: {', '.join(statistics.names[:4])}, ..."
            )
        factors = [
            math.prod(factor for pattern, factor in self.priorities.items() if fnmatchcase(name, pattern))
            for name in statistics.names
        ]
        self._priorities = statistics.spread(factors).to(statistics.dtype) if self.priorities else None

    def update(self, statistics: Statistics) -> None:
        gradients = statistics.gate_gradients
        value = gradients.abs()
        if self.rule == "product":
            square = (statistics.gates * gradients).square()
            # Gradients from 1e19 on are finite, and their squares are not: those count as the largest number, below
            # which their running mean stays.
            largest = torch.finfo(square.dtype).max / 2
            value = torch.where(torch.isfinite(gradients), square.clamp_max(largest), square)
        statistics.smooth_(self._average, value, self.beta)

    def scores(self, statistics: Statistics) -> Tensor:
        return self._average if self._priorities is None else self._average * self._priorities

    def tensors(self) -> Mapping[str, Tensor]:
        return {"average": self._average}

    def facts(self) -> dict[str, Any]:
        return {"rule": self.rule, "beta": self.beta, "priorities": self.priorities}
