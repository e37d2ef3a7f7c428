"""A training whose ranks a strategy chooses under a falling budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from peftkernels.allocation import Budget, BudgetAllocator, Strategy
from peftkernels.cli.demo.batches import Batch
from peftkernels.cli.demo.model import ClassifierOutput, TextClassifier
from peftkernels.cli.demo.recipe import Recipe
from peftkernels.cli.demo.runs import Run
from peftkernels.nn import AdaLoRALinear

Policy = Callable[[BudgetAllocator], None]


class BudgetRun(Run):
    """Gated adapters under ``strategy``; every strategy is driven alike.

    Args:
        unit: "ranks": the run ends with exactly the target's ranks. "parameters": it ends with no more parameters in
            live ranks than that many ranks in every module have, and less than one rank fewer.
        policies: run after every step of the allocator.
    """

    gated = True

    def __init__(
        self,
        name: str,
        classifier: TextClassifier,
        recipe: Recipe,
        strategy: Strategy,
        unit: str = "ranks",
        policies: Sequence[Policy] = (),
    ) -> None:
        super().__init__(name, classifier, classifier, recipe)
        self.allocator = BudgetAllocator(
            classifier.encoder,
            strategy,
            total_step=recipe.steps,
            budget=Budget(recipe.target_rank * sum(_costs(classifier.encoder, unit)), unit),
            tinit=recipe.tinit,
            tfinal=recipe.tfinal,
            deltaT=recipe.delta_t,
            orth_reg_weight=recipe.orthogonality_weight,
            exact_budget=True,
        )
        # Gradients are complete and not yet used: the orthogonality term needs no graph here.
        self.optimizer.register_step_pre_hook(self._before_step)
        self.allocator.attach(self.optimizer)
        for policy in policies:
            self.allocator.add_callback(policy)

    def _before_step(self, *_: Any) -> None:
        self.allocator.add_regularization_gradient()

    def forward(self, batch: Batch) -> tuple[ClassifierOutput, Tensor]:
        output, loss = super().forward(batch)
        self.allocator.observe(loss)
        return output, loss

    def ranks(self) -> dict[str, list[bool]]:
        return self.allocator.rank_pattern()

    def allocation_state(self) -> Any:
        return self.allocator.state_dict()

    def load_allocation_state(self, state: Any) -> None:
        self.allocator.load_state_dict(state)


def _costs(encoder: nn.Module, unit: str) -> list[int]:
    """What one rank of each adapted module takes of the budget."""
    layers = [module for module in encoder.modules() if isinstance(module, AdaLoRALinear)]
    return [1 if unit == "ranks" else layer.in_features + layer.out_features + 1 for layer in layers]
