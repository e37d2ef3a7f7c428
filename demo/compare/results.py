"""The outcome of the comparison as the content of comparison.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from demo.compare.contestants import BASELINE, CONTESTANTS, UNIFORM
from demo.compare.settings import Design, Setting, Trial
from demo.compare.statistics import interval, mean_loss, paired_difference, steps_to_level
from demo.compare.store import ComparisonStore

# Figures of a training that are whole numbers; what is live may differ between seeds and is told as a mean.
_COUNTS = ("live_ranks", "total_ranks", "live_parameters", "trainable_parameters")


def comparison_trials(settings: Mapping[str, Setting], seeds: Sequence[int]) -> list[Trial]:
    """The trainings whose accuracies are compared, seed by seed."""
    return [Trial(name, seed, setting) for seed in seeds for name, setting in settings.items()]


def sensitivity_trials(settings: Mapping[str, Setting], design: Design, seeds: Sequence[int]) -> list[Trial]:
    """The trainings around the settings that are compared; some are those of the comparison itself."""
    return [
        Trial(name, seed, setting)
        for seed in sensitivity_seeds(design, seeds)
        for name, chosen in settings.items()
        for setting in design.sensitivity_grid(chosen, adaptive=CONTESTANTS[name].budgeted)
    ]


def sensitivity_seeds(design: Design, seeds: Sequence[int]) -> Sequence[int]:
    """The first of the comparison's seeds."""
    return seeds[: design.sensitivity_seeds]


def contestant_results(
    settings: Mapping[str, Setting],
    design: Design,
    seeds: Sequence[int],
    store: ComparisonStore,
    timing: Mapping[str, Any],
) -> dict[str, Any]:
    """A row for each contestant, the baseline first."""
    found = {name: [store.finished(Trial(name, seed, setting)) for seed in seeds] for name, setting in settings.items()}
    accuracies = {name: [outcome["accuracy"] for outcome in outcomes] for name, outcomes in found.items()}
    rows: dict[str, Any] = {}
    for name, outcomes in found.items():
        level = design.loss_level * math.log(outcomes[0]["labels"])
        steps = [steps_to_level(outcome["losses"], level) for outcome in outcomes]
        reached = [step for step in steps if step is not None]
        rows[name] = {
            "chooses": CONTESTANTS[name].chooses,
            "accuracy": asdict(interval(accuracies[name])),
            "difference": _difference(name, BASELINE, accuracies),
            "difference_to_uniform": _difference(name, UNIFORM, accuracies) if CONTESTANTS[name].chooses else None,
            "unit": CONTESTANTS[name].unit,
            **{figure: round(statistics.fmean(outcome[figure] for outcome in outcomes)) for figure in _COUNTS},
            **_frozen(name, outcomes),
            "training_processor_seconds": statistics.fmean(o["training_processor_seconds"] for o in outcomes),
            "loss_level": level,
            "steps_to_level": statistics.fmean(reached) if reached else None,
            "reached_level": len(reached),
            "mean_loss": asdict(interval([mean_loss(outcome["losses"]) for outcome in outcomes])),
            **{f"step_{figure}": value for figure, value in timing["contestants"][name].items()},
            "by_seed": [
                {
                    "seed": seed,
                    "accuracy": outcome["accuracy"],
                    "steps_to_level": step,
                    "mean_loss": mean_loss(outcome["losses"]),
                    "live_ranks_by_module": outcome["live_ranks_by_module"],
                }
                for seed, outcome, step in zip(seeds, outcomes, steps, strict=True)
            ],
        }
    return rows


def _frozen(name: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not CONTESTANTS[name].freezes:
        return {}
    return {"frozen_modules": statistics.fmean(len(outcome["frozen_modules"]) for outcome in outcomes)}


def _difference(name: str, other: str, accuracies: Mapping[str, list[float]]) -> dict[str, Any] | None:
    if name == other or other not in accuracies:
        return None
    return asdict(paired_difference(accuracies[name], accuracies[other]))


def sensitivity_results(
    settings: Mapping[str, Setting], design: Design, seeds: Sequence[int], store: ComparisonStore
) -> dict[str, Any]:
    """Mean accuracy and ACTIVE ranks at every point of the grid, and how far accuracies lie apart, by contestant."""
    results: dict[str, Any] = {}
    used = sensitivity_seeds(design, seeds)
    for name, chosen in settings.items():
        points = []
        for setting in design.sensitivity_grid(chosen, adaptive=CONTESTANTS[name].budgeted):
            outcomes = [store.finished(Trial(name, seed, setting)) for seed in used]
            points.append(
                {
                    "target_rank": setting.target_rank,
                    "delta_t": setting.delta_t,
                    "live_ranks": round(statistics.fmean(outcome["live_ranks"] for outcome in outcomes)),
                    "accuracy": statistics.fmean(outcome["accuracy"] for outcome in outcomes),
                }
            )
        results[name] = {
            "seeds": len(used),
            "delta_t": chosen.delta_t,
            "points": points,
            "range_over_target_rank": _spread([p for p in points if p["delta_t"] == chosen.delta_t]),
            "range_over_delta_t": (
                _spread([p for p in points if p["target_rank"] == chosen.target_rank])
                if CONTESTANTS[name].budgeted
                else None
            ),
        }
    return results


def _spread(points: Sequence[Mapping[str, Any]]) -> float:
    accuracies = [point["accuracy"] for point in points]
    return max(accuracies) - min(accuracies)
