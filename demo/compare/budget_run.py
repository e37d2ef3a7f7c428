"""A training whose ranks a strategy chooses under a falling budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from demo.batches import Batch
from demo.compare.search_space import groups_in
from demo.model import ClassifierOutput, TextClassifier
from demo.recipe import Recipe
from demo.runs import Run
from peftkernels.allocation import Budget, BudgetAllocator, Strategy
from peftkernels.allocation.policies.learning_rate import LearningRateMultipliers, module_groups
from peftkernels.allocation.search import Candidate
from peftkernels.nn import AdaLoRALinear


class Policy(Protocol):
    """What acts on a training beside its strategy, after every step of the allocator."""

    def __call__(self, allocator: BudgetAllocator) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class BudgetRun(Run):
    """Gated adapters under ``strategy``; every strategy is driven alike.

    Args:
        unit: "ranks": the run ends with exactly the target's ranks. "parameters": it ends with no more parameters in
            ACTIVE ranks than that many ranks in every module have, and less than one rank fewer.
        policies: run after every step of the allocator; those that set learning rates by module get a parameter group
            for each.
        candidate: gives the schedule and the groups' budgets, in ranks, in place of the recipe.
    """

    gated = True

    def __init__(
        self,
        name: str,
        classifier: TextClassifier,
        recipe: Recipe,
        strategy: Strategy,
        *,
        unit: str = "ranks",
        policies: Sequence[Policy] = (),
        candidate: Candidate | None = None,
    ) -> None:
        self.policies = policies
        super().__init__(name, classifier, classifier, recipe)
        layers = [n for n, module in classifier.encoder.named_modules() if isinstance(module, AdaLoRALinear)]
        if candidate is None:
            budget = Budget(recipe.target_rank * sum(_costs(classifier.encoder, unit)), unit)
            tinit, tfinal, every = recipe.tinit, recipe.tfinal, recipe.delta_t
        else:
            budget = candidate.budget(groups_in(layers), layers)
            schedule = candidate.schedule(recipe.steps)
            tinit, tfinal, every = schedule["tinit"], schedule["tfinal"], schedule["deltaT"]
        self.allocator = BudgetAllocator(
            classifier.encoder,
            strategy,
            total_step=recipe.steps,
            budget=budget,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=every,
            orth_reg_weight=recipe.orthogonality_weight,
            exact_budget=True,
        )
        # Gradients are complete and not yet used: the orthogonality term needs no graph here.
        self.optimizer.register_step_pre_hook(self._before_step)
        self.allocator.attach(self.optimizer)
        for policy in policies:
            if isinstance(policy, LearningRateMultipliers):
                policy.attach(self.allocator)
            else:
                self.allocator.add_callback(policy)

    def adapter_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        if any(isinstance(policy, LearningRateMultipliers) for policy in self.policies):
            return module_groups(self.classifier.encoder)
        return super().adapter_groups(parameters)

    def _before_step(self, *_: Any) -> None:
        self.allocator.add_regularization_gradient()

    def forward(self, batch: Batch) -> tuple[ClassifierOutput, Tensor]:
        output, loss = super().forward(batch)
        self.allocator.observe(loss)
        return output, loss

    def ranks(self) -> dict[str, list[bool]]:
        return self.allocator.rank_pattern()

    def allocation_state(self) -> Any:
        policies = [policy.state_dict() for policy in self.policies]
        return {"allocator": self.allocator.state_dict(), "policies": policies}

    def load_allocation_state(self, state: Any) -> None:
        self.allocator.load_state_dict(state["allocator"])
        for policy, own in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(own)


def _costs(encoder: nn.Module, unit: str) -> list[int]:
    """What one rank of each adapted module takes of the budget."""
    layers = [module for module in encoder.modules() if isinstance(module, AdaLoRALinear)]
    return [1 if unit == "ranks" else layer.in_features + layer.out_features + 1 for layer in layers]
