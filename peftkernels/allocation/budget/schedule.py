"""How much may be kept at a step: AdaLoRA's cubic schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """The budget, over all layers that share it, after optimizer step t = 1, 2, … (AdaLoRA, arXiv 2303.10512, eq. 12).

        t <= tinit:            b = b0, no mask
        t > last_allocation:   b = bT, mask
        else:                  b = int((b0 - bT)·μ³ + bT) with μ = 1 - (t - tinit)/(last_allocation - tinit),
                               mask where t mod deltaT == 0

    All arithmetic is in float64, in this order, so that `int` rounds down as it does in HF peft.

    Attributes:
        initial_budget: b0.
        final_budget: bT.
        tinit: Steps before the first mask.
        last_allocation: total_step - tfinal.
        deltaT: Steps between two masks.
        whole: False leaves out `int`, for budgets that are not counted but measured.
    """

    initial_budget: float
    final_budget: float
    tinit: int
    last_allocation: int
    deltaT: int
    whole: bool = True

    def __call__(self, step: int) -> tuple[float, bool]:
        """Return the budget after `step`, and True if the schedule asks for a mask there."""
        if step <= self.tinit:
            return self.initial_budget, False
        if step > self.last_allocation:
            return self.final_budget, True
        remaining = 1 - (step - self.tinit) / (self.last_allocation - self.tinit)
        budget = (self.initial_budget - self.final_budget) * (remaining**3) + self.final_budget
        return (int(budget) if self.whole else budget), step % self.deltaT == 0
