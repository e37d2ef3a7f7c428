"""One training of the comparison, from its seed to its figures."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from demo.batches import Encoded, collate, training_order
from demo.compare.budget_run import BudgetRun
from demo.compare.contestants import CONTESTANTS, Earlier
from demo.compare.settings import VALIDATION, Setting, Trial
from demo.model import quiet_transformers
from demo.options import Options
from demo.prepare import Prepared, prepare
from demo.recipe import Recipe
from demo.runs import Run, Start
from demo.train import accuracy

VALIDATION_SHARE = 0.2


@functools.lru_cache(maxsize=1)
def prepared_for(options: Options) -> Prepared:
    """Texts, model and batches of one seed; trials come seed by seed, so the last one is kept."""
    quiet_transformers()
    return prepare(options, ())


def run_trial(
    trial: Trial, earlier: Earlier, options: Options, initial_rank: int, orthogonality_weight: float
) -> dict[str, Any]:
    """Train, measure accuracy on the texts held out, and return all figures, for JSON.

    Args:
        earlier: what trainings before have found of what the trial starts from.
        options: the demo's; their seed is replaced by the trial's.

    Raises:
        RuntimeError: the training ended with more or less than its budget.
    """
    prepared = prepared_for(replace(options, seed=trial.seed))
    start = start_for(prepared, trial.setting, initial_rank, orthogonality_weight)
    training, held_out, order = prepared.training, prepared.test, prepared.order
    if trial.held_out == VALIDATION:
        training, held_out = carve(prepared.training, trial.seed)
        order = training_order([len(ids) for ids in training.ids], options.batch_size, options.steps, trial.seed)
    torch.manual_seed(trial.seed)
    began = time.process_time()
    run = CONTESTANTS[trial.contestant].build(start, earlier)
    losses = [float(run.step(collate(training, batch))[0]) for batch in order]
    trained = time.process_time()
    reached = accuracy(run, held_out)
    return {
        "trial": trial.as_dict(),
        "accuracy": reached,
        "losses": losses,
        **_ranks_and_parameters(trial, run),
        "labels": len(prepared.labels),
        "texts": {"training": len(training), "held_out": len(held_out)},
        "threads": torch.get_num_threads(),
        "training_processor_seconds": trained - began,
        "evaluation_processor_seconds": time.process_time() - trained,
    }


def start_for(prepared: Prepared, setting: Setting, initial_rank: int, orthogonality_weight: float) -> Start:
    """The prepared start with the recipe of a setting."""
    recipe: Recipe = replace(
        prepared.start.recipe,
        lora_rank=setting.target_rank,
        lora_alpha=setting.scale * setting.target_rank,
        init_rank=initial_rank,
        target_rank=setting.target_rank,
        adalora_alpha=setting.scale * initial_rank,
        delta_t=setting.delta_t,
        orthogonality_weight=orthogonality_weight,
        lora_learning_rate=setting.learning_rate,
        adalora_learning_rate=setting.learning_rate,
    )
    return replace(prepared.start, recipe=recipe)


def carve(training: Encoded, seed: int) -> tuple[Encoded, Encoded]:
    """A fifth of the training texts, drawn with ``seed``, taken out as validation texts: (the rest, the fifth)."""
    order = list(range(len(training)))
    random.Random(seed).shuffle(order)
    size = max(1, round(VALIDATION_SHARE * len(order)))
    return _part(training, sorted(order[size:])), _part(training, sorted(order[:size]))


def _part(data: Encoded, indices: Sequence[int]) -> Encoded:
    return Encoded([data.ids[i] for i in indices], [data.classes[i] for i in indices], data.pad_id)


def _ranks_and_parameters(trial: Trial, run: Run) -> dict[str, Any]:
    pattern = run.ranks()
    live = {name: sum(kept) for name, kept in pattern.items()}
    contestant = CONTESTANTS[trial.contestant]
    costs = {name: _parameters_of_a_rank(run, name, contestant.budgeted) for name in live}
    parameters = sum(ranks * costs[name] for name, ranks in live.items())
    found = sum(live.values())
    budget = least = trial.setting.target_rank * len(live)
    if contestant.unit == "parameters":
        found, budget = parameters, trial.setting.target_rank * sum(costs.values())
        least = budget - max(costs.values()) + 1
    if not least <= found <= budget:
        raise RuntimeError(f"{trial.key}: ended with {found} ACTIVE {contestant.unit}, expected the budget, {budget}")
    parameters += sum(p.numel() for p in run.classifier.head.parameters())
    frozen = {"frozen_modules": list(run.allocator.frozen)} if isinstance(run, BudgetRun) and contestant.freezes else {}
    return {
        "live_ranks": sum(live.values()),
        "total_ranks": sum(len(kept) for kept in pattern.values()),
        "live_ranks_by_module": live,
        "live_parameters": parameters,
        "trainable_parameters": run.trainable_parameters(),
        **frozen,
    }


def _parameters_of_a_rank(run: Run, name: str, gated: bool) -> int:
    outputs, inputs = run.classifier.encoder.get_submodule(f"{name}.base_layer").weight.shape  # type: ignore[misc]
    return int(outputs + inputs + gated)
