"""A choice of ranks at one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """A choice of ranks at a step: scores (Σ r,) and thresholds (S,), one per share of the budget, stay on their device
    until somebody asks."""

    step: int
    budget: float
    scores: Tensor
    thresholds: Tensor

    def to(self, device: torch.device) -> Decision:
        return Decision(self.step, self.budget, self.scores.to(device), self.thresholds.to(device))
