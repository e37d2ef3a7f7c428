"""The same trainings on HF peft, as its users write them, from the same initial adapters and head."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from demo.batches import Batch
from demo.model import ClassifierOutput, TextClassifier
from demo.recipe import Recipe
from demo.runs import Run, Start, build_adalora, build_lora, copy_of_base

_ADAPTER = "default"
_ENCODER = "encoder."


class PeftLoraRun(Run):
    """peft's LoRA."""

    def __init__(self, name: str, model: peft.PeftModel, recipe: Recipe) -> None:
        classifier = model.base_model.model
        assert isinstance(classifier, TextClassifier)
        super().__init__(name, model, classifier, recipe)
        self._recipe = recipe

    def ranks(self) -> dict[str, list[bool]]:
        return {
            name: [True] * self._recipe.lora_rank
            for name, module in self.classifier.encoder.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        }


class PeftAdaLoraRun(Run):
    """peft's AdaLoRA: its forward adds the orthogonality term, ``update_and_allocate`` decides the ranks."""

    gated = True

    def __init__(self, name: str, model: peft.PeftModel, recipe: Recipe) -> None:
        classifier = model.base_model.model
        assert isinstance(classifier, TextClassifier)
        super().__init__(name, model, classifier, recipe)
        self._adalora = model.base_model
        self._config = model.peft_config[_ADAPTER]
        self._layers = {
            name: module
            for name, module in classifier.encoder.named_modules()
            if isinstance(module, peft.tuners.adalora.SVDLinear)
        }

    def forward(self, batch: Batch) -> tuple[ClassifierOutput, Tensor]:
        # Without a task type PeftModel.forward goes round AdaLoraModel.forward, which adds the orthogonality term.
        output: ClassifierOutput = self._adalora(**batch.inputs())
        assert output.loss is not None
        return output, output.loss

    def allocate(self) -> None:
        self._adalora.update_and_allocate(self.steps_done)

    def ranks(self) -> dict[str, list[bool]]:
        pattern = self._config.rank_pattern
        if not pattern:
            return {name: [True] * layer.lora_E[_ADAPTER].shape[0] for name, layer in self._layers.items()}
        return {name: list(pattern[f"{_ENCODER}{name}.lora_E.{_ADAPTER}"]) for name in self._layers}

    def allocation_state(self) -> dict[str, Any]:
        allocator = self._adalora.rankallocator
        return {
            "ipt": dict(allocator.ipt),
            "exp_avg_ipt": dict(allocator.exp_avg_ipt),
            "exp_avg_unc": dict(allocator.exp_avg_unc),
            "rank_pattern": self._config.rank_pattern,
        }

    def load_allocation_state(self, state: dict[str, Any]) -> None:
        allocator = self._adalora.rankallocator
        allocator.ipt = dict(state["ipt"])
        allocator.exp_avg_ipt = dict(state["exp_avg_ipt"])
        allocator.exp_avg_unc = dict(state["exp_avg_unc"])
        self._config.rank_pattern = state["rank_pattern"]


def build_peft_lora(start: Start) -> PeftLoraRun:
    """peft's LoRA with peftkernels' initial adapters and head."""
    recipe = start.recipe
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=[_ENCODER + name for name in start.adaptable],
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(copy_of_base(start), config)
    ours: Any = build_lora(start).classifier
    for name in start.adaptable:
        theirs = model.base_model.model.encoder.get_submodule(name)
        layer = ours.encoder.get_submodule(name)
        _copy(theirs.lora_A[_ADAPTER].weight, layer.lora_A.weight)
        _copy(theirs.lora_B[_ADAPTER].weight, layer.lora_B.weight)
    return PeftLoraRun("peft-lora", model.train(), recipe)


def build_peft_adalora(start: Start) -> PeftAdaLoraRun:
    """peft's AdaLoRA with peftkernels' initial adapters and head; ``ranknum`` is kept a constant."""
    recipe = start.recipe
    config = peft.AdaLoraConfig(
        init_r=recipe.init_rank,
        target_r=recipe.target_rank,
        lora_alpha=recipe.adalora_alpha,
        total_step=recipe.steps,
        tinit=recipe.tinit,
        tfinal=recipe.tfinal,
        deltaT=recipe.delta_t,
        orth_reg_weight=recipe.orthogonality_weight,
        target_modules=[_ENCODER + name for name in start.adaptable],
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(copy_of_base(start), config)
    ours: Any = build_adalora(start).classifier
    for name in start.adaptable:
        theirs = model.base_model.model.encoder.get_submodule(name)
        layer = ours.encoder.get_submodule(name)
        _copy(theirs.lora_A[_ADAPTER], layer.lora_A)
        _copy(theirs.lora_B[_ADAPTER], layer.lora_B)
        _copy(theirs.lora_E[_ADAPTER], layer.lora_E)
        theirs.ranknum[_ADAPTER].requires_grad_(False)
    return PeftAdaLoraRun("peft-adalora", model.train(), recipe)


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise RuntimeError(f"peft's adapter has shape {tuple(target.shape)}, peftkernels' {tuple(source.shape)}")
    target.copy_(source)
