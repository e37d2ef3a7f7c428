"""What happened in a run, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from peftkernels.allocation.logs.run_log import LoggedEvent
from peftkernels.cli.report.heatmap import layers_and_projections
from peftkernels.cli.report.history import History, ModuleRow

_STRATEGIES = {"adalora": "AdaLoRA"}


@dataclass(frozen=True)
class Moment:
    """A line of the timeline: when, what kind of event, and what it was."""

    when: str
    kind: str
    text: str


def strategy_name(strategy: str) -> str:
    """A strategy's name as it is written in text."""
    return _STRATEGIES.get(strategy.lower(), strategy)


def summary(history: History) -> str:
    """Two sentences: what was decided, and where the ranks went and what came in the way."""
    log = history.log
    name, last = strategy_name(log.strategy), log.last_step
    modules = _count(len(log.modules), "matrix", "matrices")
    if not log.standing:
        return (
            f"{name} watches {modules} with {_count(log.total_ranks, 'rank')} and has not decided anything yet. "
            f"The log goes to step {last}{_trouble(history)}."
        )
    decisions = _count(len(log.standing), "decision")
    steps = log.steps
    when = f"at step {steps[0]}" if len(steps) == 1 else f"between step {steps[0]} and {steps[-1]}"
    share = history.active_now / log.total_ranks
    first = (
        f"Of {_count(log.total_ranks, 'rank')} in {modules}, {name} kept {history.active_now:,} "
        f"({_percent(share)}) after {last} steps, in {decisions} {when}."
    )
    return f"{first} {_where(history.rows)}{_revivals(history)}{_trouble(history)}."


def comparison(
    histories: Mapping[str, History], shares: Sequence[Sequence[float | None]], accuracies: Mapping[str, float]
) -> str:
    """Two sentences about several runs: how much they kept, and how alike and how good they are.

    Args:
        histories: what each run's log says, by its name.
        shares: for each pair of runs, the ranks kept by both over those kept by either.
        accuracies: of the runs that have one.
    """
    parts = [h.active_now / h.log.total_ranks for h in histories.values()]
    names = dict.fromkeys(strategy_name(history.log.strategy) for history in histories.values())
    text = f"{len(histories)} runs under {_listed(list(names))} keep {_span(parts)} of their ranks."
    pairs = [share for i, row in enumerate(shares) for share in row[:i] if share is not None]
    alike = "Their matrices differ, so the ranks they keep cannot be compared"
    if pairs:
        alike = f"Of the ranks that either of two runs keeps, both keep {_span(pairs)}"
    if len(accuracies) > 1:
        best, worst = (choose(accuracies, key=lambda name: accuracies[name]) for choose in (max, min))
        alike += f"; test accuracy goes from {accuracies[worst]:.3f} ({worst}) to {accuracies[best]:.3f} ({best})"
    return f"{text} {alike}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _where(rows: Sequence[ModuleRow]) -> str:
    """Which projections and layers kept most and least, by share of their ranks."""
    if len(rows) == 1:
        return f"All of them are in {rows[0].name}"
    places = layers_and_projections([row.name for row in rows])
    shares = [row.kept / row.rank for row in rows]
    if max(shares) == min(shares):
        return f"Every matrix keeps {_percent(shares[0])} of its ranks"
    by_projection = _means((projection, share) for (_, projection), share in zip(places, shares, strict=True))
    by_layer = _means((layer, share) for (layer, _), share in zip(places, shares, strict=True) if layer is not None)
    if 1 < len(by_projection) < len(rows):
        (most, high), (least, low) = by_projection[0], by_projection[-1]
        text = f"{most} kept most of its ranks ({_percent(high)}), {least} least ({_percent(low)})"
        if len(by_layer) > 1:
            text += f"; by depth, layer {by_layer[0][0]} kept most and layer {by_layer[-1][0]} least"
        return text
    best, worst = (choose(rows, key=lambda row: row.kept / row.rank) for choose in (max, min))
    return f"{best.name} kept most ({best.kept} of {best.rank}), {worst.name} least ({worst.kept} of {worst.rank})"


def _means(pairs: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    """Average by key, largest first."""
    found: dict[Any, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return sorted(((key, fmean(values)) for key, values in found.items()), key=lambda item: -item[1])


def _revivals(history: History) -> str:
    times = int(history.revived.sum())
    return f", and masked ranks came back {_times(times)}" if times else ", and no masked rank came back"


def _trouble(history: History) -> str:
    parts = []
    skipped, rollbacks, frozen = (len(history.events(kind)) for kind in ("skipped", "rollback", "frozen"))
    if skipped:
        parts.append(f"{_count(skipped, 'step')} {'was' if skipped == 1 else 'were'} skipped")
    if rollbacks:
        parts.append(f"the run was rolled back {_times(rollbacks)}")
    if frozen:
        parts.append(f"{_count(frozen, 'matrix', 'matrices')} {'was' if frozen == 1 else 'were'} frozen")
    return "; " + ", ".join(parts) if parts else "; nothing was skipped or rolled back"


def why(row: ModuleRow) -> str:
    """Why the module kept what it kept."""
    threshold = row.threshold
    if row.frozen is not None:
        held = {0: "none", row.rank: "all"}.get(row.kept, str(row.kept))
        return f"frozen at step {row.frozen} with {held} of its ranks"
    if not row.scores:
        return "no decision yet, every rank trains"
    if any(math.isnan(score) for score in row.scores):
        return "some of its scores are not numbers"
    keeping = [score for score, keep in zip(row.scores, row.keeps, strict=True) if keep]
    masked = [score for score, keep in zip(row.scores, row.keeps, strict=True) if not keep]
    if threshold is None:
        return "nothing had to be masked" if not masked else "chosen by the strategy, without a threshold"
    if (keeping and min(keeping) < threshold) or (masked and max(masked) > threshold):
        return "chosen by the strategy's own rule: the threshold alone would choose otherwise"
    if not masked:
        return f"every score is above the threshold, the lowest {_beside(min(keeping), threshold)}"
    if not keeping:
        return f"no score is above the threshold, the highest {_beside(max(masked), threshold)}"
    highest = "being the threshold" if max(masked) == threshold else _beside(max(masked), threshold)
    return f"lowest kept {_beside(min(keeping), threshold)}, highest masked {highest}"


def margin(row: ModuleRow) -> str:
    """How near the module is to another decision: distance of its nearest score, as a share of the threshold."""
    if row.nearest is None or row.threshold is None:
        return "–"
    if row.threshold <= 0:
        return f"{row.nearest:.2g}"
    share = row.nearest / row.threshold
    return f"{share:.0f}×" if share >= 10 else _percent(share, digits=0 if share >= 0.01 else 1)


def timeline(history: History) -> list[Moment]:
    """All events but the losses, those of one kind and text that follow one another joined."""
    moments: list[tuple[int, int, int, str, str]] = []
    for event in history.log.events:
        if event.kind == "loss":
            continue
        text = _event_text(event)
        if moments and moments[-1][3:] == (event.kind, text) and event.step >= moments[-1][1]:
            first, _, count, *_ = moments[-1]
            moments[-1] = (first, event.step, count + 1, event.kind, text)
        else:
            moments.append((event.step, event.step, 1, event.kind, text))
    return [
        Moment(
            f"step {first}" if first == last else f"steps {first}–{last}",
            kind,
            text if count == 1 else f"{text} ({_times(count)})",
        )
        for first, last, count, kind, text in moments
    ]


def _event_text(event: LoggedEvent) -> str:
    details = dict(event.details)
    reason = details.pop("why", None)
    if event.kind == "rollback":
        text = f"back to step {details.pop('to')}"
    elif event.kind == "frozen":
        text = f"{details.pop('module', 'a module')} is frozen"
    elif event.kind == "skipped":
        text = "scores left as they were"
    else:
        text = ""
    rest = ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in details.items())
    parts = [part for part in (text, rest) if part]
    said = ", ".join(parts)
    if reason is not None:
        said = f"{said}: {reason}" if said else str(reason)
    return said + (" (rolled back later)" if event.undone else "")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beside(score: float, threshold: float) -> str:
    """A score in thresholds; as it is where the threshold is no measure."""
    if threshold <= 0:
        return f"{score:.3g}"
    ratio = score / threshold
    digits = 3 if 0.995 <= ratio < 1.005 else 2 if ratio < 10 else 0
    return "less than 0.01×" if ratio < 0.01 else f"{ratio:,.{digits}f}×"


def _span(shares: Sequence[float]) -> str:
    least, most = _percent(min(shares)), _percent(max(shares))
    return least if least == most else f"{least} to {most}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
