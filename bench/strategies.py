"""One step of rank allocation by every strategy, over the same modules: beside each other and HF peft's AdaLoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bench import lineup
from bench.allocators import FACTORS, TOTAL_STEPS, AllocatorBench
from bench.cases import Case
from bench.verify import WrongResultError
from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.strategies import STRATEGIES
from peftkernels.nn import AdaLoRALinear


class StrategyBench(AllocatorBench):
    """peft's allocator, and every strategy on layers of its own with the same factors and gradients.

    A strategy's step is what the engine does after an optimizer step: take the loss, update statistics, select ranks
    under the exact budget, write masks.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._loss = torch.ones(())
        self._allocators = {name: self._allocator(name) for name in STRATEGIES}
        self.contestants: dict[str, Callable[[], None]] = {
            lineup.PEFT_ALLOCATOR: self._step_peft,
            **{name: partial(self._step_strategy, name) for name in STRATEGIES},
        }

    @torch.no_grad()
    def _allocator(self, name: str) -> BudgetAllocator:
        layers = {}
        for module, theirs in self._layers.items():
            linear = theirs.base_layer
            assert isinstance(linear, nn.Linear)
            layer = layers[module] = AdaLoRALinear.from_linear(linear, self.case.r)
            for factor in FACTORS:
                own, other = getattr(layer, factor), getattr(theirs, factor)
                own.copy_(other)
                own.grad = other.grad.clone()
        allocator = BudgetAllocator(
            layers, STRATEGIES[name](), total_step=TOTAL_STEPS, target_r=max(1, self.case.r // 2), exact_budget=True
        )
        allocator.observe(self._loss)
        allocator.step(self._step)
        return allocator

    def _step_strategy(self, name: str) -> None:
        allocator = self._allocators[name]
        allocator.observe(self._loss)
        allocator.step()

    def verify(self) -> None:
        """peft decides as our AdaLoRA does, and every strategy keeps exactly its budget; raises WrongResultError."""
        super().verify()
        for name, allocator in self._allocators.items():
            self._step_strategy(name)
            kept = sum(sum(mask) for mask in allocator.rank_pattern().values())
            budget = allocator.budget(allocator.steps)
            if kept != budget:
                raise WrongResultError(
                    f"{self.case.id}: {name} keeps {kept} ranks, expected {budget}; nothing was timed"
                )
