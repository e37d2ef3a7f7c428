"""What the comparison found, in words that its intervals decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demo.compare.contestants import BASELINE
from demo.compare.statistics import Interval

_SECONDS = "training_processor_seconds"
_SAMPLERS = {"tpe": "TPE", "nsga2": "NSGA-II"}


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """A paragraph for each question that the content of comparison.json answers."""
    rows = comparison["contestants"]
    baseline = rows[BASELINE]
    found = [
        *_against(rows, "difference", f"fixed rank at {baseline['live_ranks']} ACTIVE ranks"),
        *_against(rows, "difference_to_uniform", "uniform allocation"),
    ]
    for name, row in rows.items():
        if not row["chooses"] and name != BASELINE:
            found.append(f"{name}, which chooses nothing: {points(row['difference'])} against fixed rank.")
    dear = [name for name, row in rows.items() if row["unit"] == "parameters"]
    if dear:
        found.append(
            f"Equal budget means equal ACTIVE ranks, but for {', '.join(dear)}: as many parameters in ACTIVE ranks as "
            "the same number of them in every module."
        )
    seeds = len(baseline["by_seed"])
    if seeds > 1:
        found.append(
            f"Intervals are 95 % t intervals over {seeds} seeds, each for its strategy alone: of twenty true zeros one "
            "is expected to look like a difference. Seeds draw their splits from the same texts."
        )
    return [*found, *_frozen(rows), *_tuning(comparison)]


def _frozen(rows: Mapping[str, Any]) -> list[str]:
    found = []
    for name, row in rows.items():
        if "frozen_modules" in row:
            modules = len(row["by_seed"][0]["live_ranks_by_module"])
            own = f"took {row['frozen_modules']:.1f} of {modules} modules out of the training on average"
            others = f", adalora's {rows['adalora'][_SECONDS]:.1f} s" if "adalora" in rows else ""
            found.append(f"{name} {own}; a training took {row[_SECONDS]:.1f} s of processor time{others}.")
    return found


def _against(rows: Mapping[str, Any], figure: str, other: str) -> list[str]:
    differences = {name: row[figure] for name, row in rows.items() if row["chooses"] and row[figure] is not None}
    if not differences:
        return []
    better: list[str] = []
    worse: list[str] = []
    undecided: list[str] = []
    for name, difference in differences.items():
        each = Interval(**difference)
        (better if each.above_zero else worse if each.below_zero else undecided).append(f"{name} {points(difference)}")
    if better:
        parts = [f"Better than {other}: {'; '.join(better)}."]
    elif len(differences) == 1:
        parts = [f"{next(iter(differences))} does not beat {other}."]
    else:
        parts = [f"None of the {len(differences)} adaptive strategies beats {other}."]
    if worse:
        parts.append(f"Worse than {other}: {'; '.join(worse)}.")
    if undecided:
        parts.append(
            f"No difference to {other} can be told (the interval holds zero, or there is one seed): "
            f"{'; '.join(undecided)}."
        )
    return [" ".join(parts)]


def points(difference: Mapping[str, Any] | None) -> str:
    """A difference of accuracies with its interval: ``+1.2 points (−0.3 to +2.7)``."""
    if difference is None:
        return ""
    each = Interval(**difference)
    text = f"{_signed(each.mean)} points"
    return text if each.low is None or each.high is None else f"{text} ({_signed(each.low)} to {_signed(each.high)})"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _tuning(comparison: Mapping[str, Any]) -> list[str]:
    tuning, seeds = comparison["tuning"], len(comparison["design"]["tuning_seeds"])
    edges = {name: row["at_edge"] for name, row in tuning.items() if row["at_edge"]}
    searches = {name: row for name, row in tuning.items() if row["method"] != "grid"}
    on_grid = next(row for row in tuning.values() if row["method"] == "grid")
    others = f" but {' and '.join(searches)}" if searches else ""
    splits = "one split" if seeds == 1 else f"{seeds} splits"
    text = (
        f"Every contestant{others} was tuned with {len(on_grid['trials'])} trials on the same grid, by accuracy on "
        f"validation texts of {splits}."
    )
    if edges:
        listed = "; ".join(f"{name} ({', '.join(what).replace('_', ' ')})" for name, what in edges.items())
        text += f" Chosen at an edge of the grid, so that a better value may lie beyond it: {listed}."
    return [text, *(_search(name, row, comparison) for name, row in searches.items())]


def _search(name: str, row: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    candidate = row["setting"]["candidate"]
    groups = ", ".join(f"{group} {weight:.2g}" for group, weight in candidate["group_weights"].items())
    text = (
        f"{name} is AdaLoRA after {comparison['design']['search_trials']} trainings chosen by Optuna "
        f"({_SAMPLERS[row['method']]}), not tuned on the grid; it chose learning rate "
        f"{candidate['learning_rate']:.2g}, scale {row['setting']['scale']:.2g}, tinit {candidate['tinit']:.2f} and "
        f"tfinal {candidate['tfinal']:.2f} of the run, ΔT {candidate['deltaT']}, and weights of the groups: {groups}."
    )
    if "front" in row:
        points = "; ".join(f"{each['live_parameters']:,.0f}: {each['accuracy']:.3f}" for each in row["front"])
        text += f" Its front, validation accuracy by parameters in ACTIVE ranks: {points}."
    return text
