"""The trainings on peftkernels: head only, fixed-rank LoRA, AdaLoRA; each one model, optimizer and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.batches import Batch
from demo.model import ClassifierOutput, TextClassifier, share_frozen
from demo.recipe import Recipe
from peftkernels.allocation import AdaLoraAllocator, DecisionLog
from peftkernels.nn import AdaLoRALinear, LoRALinear


@dataclass(frozen=True)
class Start:
    """What all runs start from.

    Attributes:
        base: frozen encoder with the seeded head; runs take copies that share the frozen weights.
        adaptable: names of the encoder's linear modules that get an adapter.
        seed: seeds the adapters' initial values, which HF peft's runs copy.
    """

    base: TextClassifier
    adaptable: Sequence[str]
    recipe: Recipe
    seed: int


class Run:
    """One training. ``step`` does all that a training step costs; ``state_dict`` holds all that continues it.

    Attributes:
        gated: True where the adapters have gates, and AdaLoRA's learning rate.
    """

    gated = False

    def __init__(self, name: str, model: nn.Module, classifier: TextClassifier, recipe: Recipe) -> None:
        self.name = name
        self.model = model
        self.classifier = classifier
        head = {id(p) for p in classifier.head.parameters()}
        adapter_rate = recipe.adalora_learning_rate if self.gated else recipe.lora_learning_rate
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if id(p) in head], "lr": recipe.head_learning_rate},
            *(
                {**group, "lr": adapter_rate}
                for group in self.adapter_groups([p for p in trainable if id(p) not in head])
            ),
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=recipe.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.learning_rate_factor(step)
        )
        self.steps_done = 0
        self.decisions: DecisionLog | None = None

    def adapter_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """The optimizer's groups of the adapters' parameters; their learning rate is added."""
        return [{"params": parameters}]

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the cross-entropy and the loss that was differentiated, both 0-dim, detached."""
        output, loss = self.forward(batch)
        assert output.task_loss is not None
        loss.backward()
        self.optimizer.step()
        self.steps_done += 1
        self.allocate()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return output.task_loss, loss.detach()

    def forward(self, batch: Batch) -> tuple[ClassifierOutput, Tensor]:
        """The model's output and the loss to differentiate."""
        output: ClassifierOutput = self.model(**batch.inputs())
        assert output.loss is not None
        return output, self.add_regularization(output.loss)

    def add_regularization(self, loss: Tensor) -> Tensor:
        """The loss with the strategy's own term."""
        return loss

    def allocate(self) -> None:
        """Decide the ranks, after the optimizer's step and before the gradients are cleared."""

    def ranks(self) -> dict[str, list[bool]]:
        """For every adapted module of the encoder by name: which of its ranks are live. Empty without adapters."""
        return {}

    def log_decisions(self, path: Path) -> None:
        """Log to ``path`` from here on what is decided about ranks; runs that decide nothing write nothing."""

    def trainable_parameters(self) -> int:
        """Number of trainable scalars, head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        """Everything of the model's state that is not a frozen parameter."""
        frozen = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name not in frozen}

    def state_dict(self) -> dict[str, Any]:
        """Model (without the frozen weights), optimizer, learning-rate schedule, allocation, step."""
        return {
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "allocation": self.allocation_state(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: the state belongs to another model.
        """
        mine = set(self.weights())
        if mine != set(state["weights"]):
            raise ValueError(f"{self.name}: state has other weights: {sorted(mine ^ set(state['weights']))[:4]}")
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.load_allocation_state(state["allocation"])
        self.steps_done = state["steps_done"]

    def allocation_state(self) -> Any:
        """What the rank decisions need to go on."""
        return None

    def load_allocation_state(self, state: Any) -> None:
        """Inverse of ``allocation_state``."""


class LoraRun(Run):
    """Fixed ranks."""

    def __init__(self, name: str, classifier: TextClassifier, recipe: Recipe) -> None:
        super().__init__(name, classifier, classifier, recipe)
        self._layers = {n: m for n, m in classifier.encoder.named_modules() if isinstance(m, LoRALinear)}

    def ranks(self) -> dict[str, list[bool]]:
        return {name: [True] * layer.lora_A.weight.shape[0] for name, layer in self._layers.items()}


class AdaLoraRun(Run):
    """Ranks under a falling budget; the allocator acts in the optimizer's step."""

    gated = True

    def __init__(self, name: str, classifier: TextClassifier, recipe: Recipe) -> None:
        super().__init__(name, classifier, classifier, recipe)
        self.allocator = AdaLoraAllocator(
            classifier.encoder,
            total_step=recipe.steps,
            target_r=recipe.target_rank,
            tinit=recipe.tinit,
            tfinal=recipe.tfinal,
            deltaT=recipe.delta_t,
            orth_reg_weight=recipe.orthogonality_weight,
        )
        self.allocator.attach(self.optimizer)

    def add_regularization(self, loss: Tensor) -> Tensor:
        if self.decisions is not None:
            self.allocator.observe(loss)
        return loss + self.allocator.regularization()

    def log_decisions(self, path: Path) -> None:
        self.decisions = DecisionLog(path)
        self.allocator.add_observer(self.decisions)

    def ranks(self) -> dict[str, list[bool]]:
        return self.allocator.rank_pattern()

    def allocation_state(self) -> Any:
        return self.allocator.state_dict()

    def load_allocation_state(self, state: Any) -> None:
        self.allocator.load_state_dict(state)


def build_head(start: Start) -> Run:
    """Only the head is trained."""
    classifier = copy_of_base(start)
    return Run("head", classifier, classifier, start.recipe)


def build_lora(start: Start) -> LoraRun:
    """Adapters of one fixed rank on every adaptable module."""
    recipe = start.recipe
    classifier = with_adapters(
        start, lambda linear: LoRALinear.from_linear(linear, r=recipe.lora_rank, lora_alpha=recipe.lora_alpha)
    )
    return LoraRun("lora", classifier, recipe)


def build_adalora(start: Start) -> AdaLoraRun:
    """Gated adapters whose ranks an allocator decides."""
    recipe = start.recipe
    classifier = with_adapters(
        start, lambda linear: AdaLoRALinear.from_linear(linear, r=recipe.init_rank, lora_alpha=recipe.adalora_alpha)
    )
    return AdaLoraRun("adalora", classifier, recipe)


def copy_of_base(start: Start) -> TextClassifier:
    """The starting model; frozen weights are shared with it, the head is a copy."""
    classifier = share_frozen(start.base)
    assert isinstance(classifier, TextClassifier)
    return classifier.train()


def with_adapters(start: Start, adapt: Callable[[nn.Linear], nn.Module]) -> TextClassifier:
    """The starting model with ``adapt(linear)`` in the place of each adaptable module, drawn from the start's seed."""
    classifier = copy_of_base(start)
    torch.manual_seed(start.seed)
    for name in start.adaptable:
        linear = classifier.encoder.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        classifier.encoder.set_submodule(name, adapt(linear))
    return classifier.train()
