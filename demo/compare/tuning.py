"""Contestants are tuned alike: the same grid, the same seeds, the accuracy on validation texts decides. Searches are
methods of tuning by themselves, and have more trials."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from demo.compare.contestants import CONTESTANTS
from demo.compare.settings import VALIDATION, Design, Setting, Trial
from demo.compare.statistics import mean_loss
from demo.compare.store import ComparisonStore
from peftkernels.allocation.search import BudgetSearch

# Trains what is not trained yet.
Train = Callable[[str, Sequence[Trial]], None]


@dataclass(frozen=True)
class Tuned:
    """The setting that a contestant is compared with, and all that were tried."""

    chosen: Setting
    tried: tuple[Setting, ...]

    def trials(self, name: str, design: Design) -> list[Trial]:
        """The trainings that it took."""
        return tuning_trials({name: self.tried}, design)


def tune(names: Sequence[str], design: Design, store: ComparisonStore, train: Train) -> dict[str, Tuned]:
    """Tune every contestant: first those on the grid, then those that start from what one of the first has found, then
    those with a search. Returned in the order of ``names``."""
    on_grid = [name for name in names if CONTESTANTS[name].search is None and CONTESTANTS[name].learns_from is None]
    learners = [name for name in names if CONTESTANTS[name].learns_from is not None]
    tuned = _tune_on_grid("tuning", dict.fromkeys(on_grid), design, store, train)
    priors = {name: _best_trial(tuned, CONTESTANTS[name].learns_from, design).key for name in learners}
    if priors:
        tuned |= _tune_on_grid("tuning of those that learn from others", priors, design, store, train)
    for name in names:
        if CONTESTANTS[name].search is not None:
            tuned[name] = _search(name, design, store, train)
    return {name: tuned[name] for name in names}


def trials_of_tuning(names: Sequence[str], design: Design) -> int:
    """How many trainings `tune` takes, at most."""
    searches = sum(CONTESTANTS[name].search is not None for name in names)
    on_grid = (len(names) - searches) * len(list(design.tuning_grid()))
    return (on_grid + searches * design.search_trials) * len(design.tuning_seeds)


def tuning_trials(settings: Mapping[str, Sequence[Setting]], design: Design) -> list[Trial]:
    """The trainings of settings to try."""
    return [
        Trial(name, seed, setting, VALIDATION)
        for seed in design.tuning_seeds
        for name, own in settings.items()
        for setting in own
    ]


def tuning_results(tuned: Mapping[str, Tuned], design: Design, store: ComparisonStore) -> dict[str, Any]:
    """Every setting tried with its validation accuracy, what was chosen, and whether that lies at an edge.

    A choice at an edge of the grid may have a better one beyond it. Where the grid has only two values of something,
    each is at an edge, and nothing is said. A search for few parameters has its front besides.
    """
    grids = {"learning_rate": design.learning_rates, "scale": design.scales}
    rows: dict[str, Any] = {}
    for name, own in tuned.items():
        search = CONTESTANTS[name].search
        rows[name] = {
            "method": "grid" if search is None else search.sampler,
            "trials": [{**s.as_dict(), "accuracy": _merit(name, s, design, store)[0]} for s in own.tried],
            "chosen": {quantity: getattr(own.chosen, quantity) for quantity in grids},
            "setting": own.chosen.as_dict(),
            "at_edge": [
                quantity
                for quantity, values in grids.items()
                if search is None and len(values) > 2 and getattr(own.chosen, quantity) in (min(values), max(values))
            ],
        }
        if search is not None and search.for_few:
            rows[name]["front"] = _front(name, own.tried, design, store)
    return rows


def _tune_on_grid(
    title: str, priors: Mapping[str, str | None], design: Design, store: ComparisonStore, train: Train
) -> dict[str, Tuned]:
    grids = {name: tuple(design.tuning_grid(prior)) for name, prior in priors.items()}
    train(title, tuning_trials(grids, design))
    return {name: Tuned(_best(name, grid, design, store), grid) for name, grid in grids.items()}


def _search(name: str, design: Design, store: ComparisonStore, train: Train) -> Tuned:
    """What `BudgetSearch` finds. It starts anew each time, and makes the same choices, since trainings are kept."""
    plan = CONTESTANTS[name].search
    assert plan is not None
    search = BudgetSearch(
        plan.space(design), directions=plan.directions, sampler=plan.sampler, seed=design.tuning_seeds[0]
    )
    tried: list[Setting] = []
    while len(tried) < design.search_trials:
        asked = search.ask(min(design.search_batch, design.search_trials - len(tried)))
        settings = [Setting.of(each.candidate) for each in asked]
        train(f"{name}, from trial {len(tried) + 1}", tuning_trials({name: settings}, design))
        for each, setting in zip(asked, settings, strict=True):
            values = (_merit(name, setting, design, store)[0], _live_parameters(name, setting, design, store))
            search.tell(each.number, *values[: len(plan.directions)])
        tried += settings
    # All are compared at the same target.
    eligible = [setting for setting in tried if setting.target_rank == design.target_rank]
    chosen = _best(name, eligible or tried, design, store)
    return Tuned(chosen.at(target_rank=design.target_rank), tuple(dict.fromkeys(tried)))


def _front(name: str, tried: Sequence[Setting], design: Design, store: ComparisonStore) -> list[dict[str, Any]]:
    """What was tried and nothing beats in accuracy with as few parameters in ACTIVE ranks; fewest parameters first."""
    found = [(_live_parameters(name, s, design, store), _merit(name, s, design, store)[0], s) for s in tried]
    front: list[dict[str, Any]] = []
    for parameters, accuracy, setting in sorted(found, key=lambda each: (each[0], -each[1])):
        if not front or accuracy > front[-1]["accuracy"]:
            front.append({"live_parameters": parameters, "accuracy": accuracy, "target_rank": setting.target_rank})
    return front


def _best_trial(tuned: Mapping[str, Tuned], name: str | None, design: Design) -> Trial:
    assert name is not None
    return Trial(name, design.tuning_seeds[0], tuned[name].chosen, VALIDATION)


def _best(name: str, settings: Sequence[Setting], design: Design, store: ComparisonStore) -> Setting:
    """That of highest mean validation accuracy; of equal ones, that of lower training loss."""
    return max(settings, key=lambda setting: _merit(name, setting, design, store))


def _merit(name: str, setting: Setting, design: Design, store: ComparisonStore) -> tuple[float, float]:
    found = _outcomes(name, setting, design, store)
    accuracies = [outcome["accuracy"] for outcome in found]
    return statistics.fmean(accuracies), -statistics.fmean(mean_loss(outcome["losses"]) for outcome in found)


def _live_parameters(name: str, setting: Setting, design: Design, store: ComparisonStore) -> float:
    return statistics.fmean(outcome["live_parameters"] for outcome in _outcomes(name, setting, design, store))


def _outcomes(name: str, setting: Setting, design: Design, store: ComparisonStore) -> list[dict[str, Any]]:
    return [store.finished(Trial(name, seed, setting, VALIDATION)) for seed in design.tuning_seeds]
