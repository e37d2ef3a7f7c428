"""What every run of the demo has in common: the numbers of the training recipe, chosen once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

RUN_NAMES = ("head", "lora", "adalora", "peft-lora", "peft-adalora")
PEFT_RUNS = ("peft-lora", "peft-adalora")
ADAPTIVE_RUNS = ("adalora", "peft-adalora")
TITLES = {
    "head": "head only",
    "lora": "LoRA, peftkernels",
    "adalora": "AdaLoRA, peftkernels",
    "peft-lora": "LoRA, peft",
    "peft-adalora": "AdaLoRA, peft",
}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of all runs.

    Attributes:
        steps: optimizer steps of each training.
        lora_rank: of fixed-rank adapters.
        lora_alpha: their scaling is lora_alpha / lora_rank.
        init_rank: AdaLoRA's ranks per matrix at the start.
        target_rank: AdaLoRA's ranks per matrix at the end, on average.
        adalora_alpha: AdaLoRA's scaling is adalora_alpha / init_rank.
        tinit: AdaLoRA's steps before the budget starts to fall.
        tfinal: AdaLoRA's steps after it has reached its target.
        delta_t: steps between two allocations.
        lora_learning_rate: of plain factors.
        adalora_learning_rate: of gated ones, which need more: docs/learning-rate-and-scale.md.
    """

    steps: int
    lora_rank: int = 8
    lora_alpha: float = 16
    init_rank: int = 12
    target_rank: int = 8
    adalora_alpha: float = 48
    delta_t: int = 1
    orthogonality_weight: float = 0.5
    lora_learning_rate: float = 3e-3
    adalora_learning_rate: float = 5e-3
    head_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warmup_share: float = 0.06

    @property
    def tinit(self) -> int:
        return self.steps // 10

    @property
    def tfinal(self) -> int:
        return (3 * self.steps) // 10

    def learning_rate_factor(self, step: int) -> float:
        """Share of the full learning rate at 0-based ``step``: linear warm-up, then linear decay towards zero."""
        warmup = max(1, round(self.warmup_share * self.steps))
        return min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup), 1.0) if self.steps else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {**asdict(self), "tinit": self.tinit, "tfinal": self.tfinal}
