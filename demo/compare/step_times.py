"""Step times of all contestants, taken in turns while the budget falls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from demo.batches import collate
from demo.compare.contestants import CONTESTANTS, Earlier
from demo.compare.settings import Design, Setting
from demo.compare.trial import start_for
from demo.measure import SECONDS_PER_ROUND, typical_and_longest_batches
from demo.prepare import Prepared
from demo.timing import FROZEN, FrozenStep, TimedRun, time_steps


def time_contestants(
    prepared: Prepared,
    settings: Mapping[str, Setting],
    earlier: Callable[[Setting], Earlier],
    design: Design,
    rounds: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Median milliseconds of a step and its ratio to the frozen step of the same round, by contestant, for JSON.

    Every contestant first trains past the step where its budget begins to fall, so that scores and masks are computed
    in every step that is timed.

    Args:
        earlier: what trainings before have found of what a setting starts from.
        advance: called with the number of undisturbed rounds so far.
    """
    recipe = prepared.start.recipe
    variants: dict[str, FrozenStep | TimedRun] = {FROZEN: FrozenStep(prepared.start.base)}
    for name, setting in settings.items():
        torch.manual_seed(prepared.start.seed)
        start = start_for(prepared, setting, design.initial_rank, design.orthogonality_weight)
        run = CONTESTANTS[name].build(start, earlier(setting))
        chosen = {} if setting.candidate is None else setting.candidate.schedule(recipe.steps)
        for batch in prepared.order[: chosen.get("tinit", recipe.tinit) + 1]:
            run.step(collate(prepared.training, batch))
        last_step = recipe.steps - chosen.get("tfinal", recipe.tfinal) - 1
        variants[name] = TimedRun(run, copy.deepcopy(run.state_dict()), last_step)
    timing = time_steps(
        variants,
        typical_and_longest_batches(prepared)[0],
        wanted_rounds=rounds,
        most_rounds=2 * rounds,
        most_seconds=SECONDS_PER_ROUND * rounds * len(variants) / 6,
        advance=advance,
    )
    return {
        "contestants": {name: asdict(step) for name, step in timing.steps.items()},
        "rounds": timing.rounds,
        "discarded": timing.discarded,
        "disturbed": timing.disturbed,
        "foreign_load_measured": timing.measured,
        "tokens_per_step": timing.tokens,
        "threads": torch.get_num_threads(),
    }
