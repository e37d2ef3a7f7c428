"""AdaLoRA's rank allocation, step for step as HF peft does it, with a state that survives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftkernels.allocation.budget.budgets import Budget
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.settings import AdaLoraSettings
from peftkernels.allocation.strategies.adalora import AdaLora


class AdaLoraAllocator(BudgetAllocator):
    """Adaptive rank budgets by AdaLoRA (Zhang et al., arXiv 2303.10512), by the rule of HF peft's RankAllocator.

    The budget of ranks over all layers falls from the sum of their ranks, b0, to target_r times their number, along a
    cubic between step `tinit` and step `total_step - tfinal`; the ranks with the lowest scores are masked by setting
    their gate lora_E to zero, and can come back while the budget still falls. `AdaLora` has the scores, `CubicSchedule`
    the budget, `select_ranks` the threshold.

        allocator = AdaLoraAllocator(model, total_step=1000, target_r=8, tinit=100, tfinal=300)
        allocator.attach(optimizer)
        for batch in batches:
            (loss(model, batch) + allocator.regularization()).backward()
            optimizer.step()
            optimizer.zero_grad()

    `BudgetAllocator` says what happens to ranks, to gradients that are not finite and to wrong arguments.

    Args:
        model: As for `BudgetAllocator`, like all that are not described here.
        total_step: Optimizer steps of the whole run.
        target_r: Average rank per layer at the end, below every layer's initial rank; 8 without a budget.
        tinit: Steps before the first mask.
        tfinal: Steps at the end in which the ranks stay as they are.
        deltaT: Steps between two masks.
        beta1: Smoothing of sensitivity, between 0 and 1.
        beta2: Smoothing of uncertainty, between 0 and 1.
        orth_reg_weight: Weight w of the orthogonality term.
        exact_budget: As for `BudgetAllocator`.
        compact: As for `BudgetAllocator`.
        budget: As for `BudgetAllocator`.
        costs: As for `BudgetAllocator`.
        capturable: As for `BudgetAllocator`.
        impl: As for `BudgetAllocator`.
    """

    settings: AdaLoraSettings

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        total_step: int,
        target_r: int | None = None,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        exact_budget: bool = False,
        compact: bool = False,
        budget: Budget | None = None,
        costs: Mapping[str, float] | None = None,
        capturable: bool = False,
        impl: str = "auto",
    ) -> None:
        settings = AdaLoraSettings(
            total_step=total_step,
            target_r=target_r,
            budget=budget,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            beta1=beta1,
            beta2=beta2,
            orth_reg_weight=orth_reg_weight,
            exact_budget=exact_budget,
            compact=compact,
            capturable=capturable,
        )
        self._begin(RunParts.make(model, AdaLora(beta1, beta2), settings, costs, impl))
