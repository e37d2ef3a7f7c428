"""Every contestant is tuned alike: the same grid, the same seeds, the accuracy on validation texts decides."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from peftkernels.cli.demo.compare.settings import VALIDATION, Design, Setting, Trial
from peftkernels.cli.demo.compare.statistics import mean_loss
from peftkernels.cli.demo.compare.store import ComparisonStore


def tuning_trials(names: Sequence[str], design: Design) -> list[Trial]:
    """All trainings of the tuning."""
    return [
        Trial(name, seed, setting, VALIDATION)
        for seed in design.tuning_seeds
        for name in names
        for setting in design.tuning_grid()
    ]


def choose_settings(names: Sequence[str], design: Design, store: ComparisonStore) -> dict[str, Setting]:
    """Each contestant's setting of highest mean validation accuracy; of equal ones, that of lower training loss."""

    def best(name: str) -> Setting:
        return max(design.tuning_grid(), key=lambda setting: _merit(name, setting, design, store))

    return {name: best(name) for name in names}


def tuning_results(chosen: dict[str, Setting], design: Design, store: ComparisonStore) -> dict[str, Any]:
    """Every point of the grid with its validation accuracy, what was chosen, and whether that lies at an edge.

    A choice at an edge of the grid may have a better one beyond it. Where the grid has only two values of something,
    each is at an edge, and nothing is said.
    """
    grids = {"learning_rate": design.learning_rates, "scale": design.scales}
    return {
        name: {
            "trials": [
                {"learning_rate": s.learning_rate, "scale": s.scale, "accuracy": _merit(name, s, design, store)[0]}
                for s in design.tuning_grid()
            ],
            "chosen": {quantity: getattr(setting, quantity) for quantity in grids},
            "at_edge": [
                quantity
                for quantity, values in grids.items()
                if len(values) > 2 and getattr(setting, quantity) in (min(values), max(values))
            ],
        }
        for name, setting in chosen.items()
    }


def _merit(name: str, setting: Setting, design: Design, store: ComparisonStore) -> tuple[float, float]:
    found = [store.finished(Trial(name, seed, setting, VALIDATION)) for seed in design.tuning_seeds]
    accuracies = [outcome["accuracy"] for outcome in found]
    return statistics.fmean(accuracies), -statistics.fmean(mean_loss(outcome["losses"]) for outcome in found)
