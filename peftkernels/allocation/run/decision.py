"""A choice of ranks at one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """A choice of ranks at a step. Scores and thresholds stay on their device until they are read.

    Attributes:
        step: The optimizer step.
        budget: What the schedule allowed, over all layers.
        scores: (Σ r,), one per rank.
        thresholds: (S,), one per share of the budget.
    """

    step: int
    budget: float
    scores: Tensor
    thresholds: Tensor

    def to(self, device: torch.device) -> Decision:
        """Return the decision on another device."""
        return Decision(self.step, self.budget, self.scores.to(device), self.thresholds.to(device))
