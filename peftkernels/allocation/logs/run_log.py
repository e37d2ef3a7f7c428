"""Reading a decision log back as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkernels._reading import MOST, check_number, shown
from peftkernels.allocation.logs.log_lines import RANKS, START, Entry, LogError, number, scan

if TYPE_CHECKING:
    import numpy as np

_OWN_FIELDS = ("event", "step")


@dataclass(frozen=True)
class LoggedModule:
    """One layer.

    Attributes:
        name: Its module path.
        rank: Its initial rank.
        in_features: K, where the log says it.
        out_features: N, likewise.
        group: The group whose budget it shares.
        cost: What one of its ranks takes of the budget.
    """

    name: str
    rank: int
    in_features: int | None
    out_features: int | None
    group: str
    cost: float


@dataclass(frozen=True)
class LoggedDecision:
    """Ranks chosen after optimizer step `step`.

    Attributes:
        step: The optimizer step.
        budget: In the budget's unit, over all modules.
        thresholds: (M,) float64, of each module; -inf where nothing was masked.
        scores: (Σ rank,) float64, modules one after the other in the order of the log; NaN where they were not logged.
        kept: (Σ rank,) bool, likewise: which ranks stay.
        scored: True if scores were logged.
        undone: True if a later rollback took the decision back.
    """

    step: int
    budget: float
    thresholds: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)
    kept: np.ndarray = field(repr=False)
    scored: bool
    undone: bool


@dataclass(frozen=True)
class LoggedEvent:
    """Something else that happened at optimizer step `step`, as `Observer.on_event` says.

    Attributes:
        step: The optimizer step.
        kind: What it was.
        details: More of it, by name.
        undone: True if a later rollback took it back.
    """

    step: int
    kind: str
    details: dict[str, Any]
    undone: bool


@dataclass(frozen=True)
class RunLog:
    """A decision log, in the order of the file.

    Attributes:
        path: The file.
        facts: What the allocator said at the start: `Observer.on_start`; `facts["step"]` is where the log begins.
        modules: The layers.
        decisions: All of them, those that a rollback took back included.
        events: What else was logged.
        torn: True if the file ends in the middle of something, which is left out.
    """

    path: Path
    facts: Mapping[str, Any]
    modules: tuple[LoggedModule, ...]
    decisions: tuple[LoggedDecision, ...] = field(repr=False)
    events: tuple[LoggedEvent, ...] = field(repr=False)
    torn: bool

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return str(self.facts.get("strategy", "unnamed"))

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return str(self.facts.get("unit", "ranks"))

    @property
    def first_step(self) -> int:
        """The step at which the log begins: 0, or where a run without an earlier log was resumed."""
        return int(self.facts["step"])

    @cached_property
    def last_step(self) -> int:
        """The last step that anything was logged about and that was not rolled back."""
        steps = [decision.step for decision in self.standing]
        steps += [event.step for event in self.events if not event.undone and event.kind != "rollback"]
        returned = [event.details["to"] for event in self.events if event.kind == "rollback"]
        return max([self.first_step, *steps, *returned[-1:]])

    @cached_property
    def standing(self) -> tuple[LoggedDecision, ...]:
        """The decisions that no rollback took back; their steps rise."""
        return tuple(decision for decision in self.decisions if not decision.undone)

    @cached_property
    def steps(self) -> np.ndarray:
        """(D,) int64, the steps of the standing decisions."""
        import numpy as np

        return np.array([decision.step for decision in self.standing], dtype=np.int64)

    @cached_property
    def budgets(self) -> np.ndarray:
        """(D,) float64, in the budget's unit."""
        import numpy as np

        return np.array([decision.budget for decision in self.standing], dtype=np.float64)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """(D, M) float64, of each module; -inf where nothing was masked."""
        import numpy as np

        return np.array([decision.thresholds for decision in self.standing]).reshape(-1, len(self.modules))

    @cached_property
    def scores(self) -> np.ndarray:
        """(D, Σ rank) float64; NaN where scores were not logged."""
        import numpy as np

        return np.array([decision.scores for decision in self.standing]).reshape(-1, self.total_ranks)

    @cached_property
    def kept(self) -> np.ndarray:
        """(D, Σ rank) bool."""
        import numpy as np

        return np.array([decision.kept for decision in self.standing], dtype=bool).reshape(-1, self.total_ranks)

    @property
    def total_ranks(self) -> int:
        """Ranks of all modules together at the start."""
        return sum(module.rank for module in self.modules)

    def part(self, index: int) -> slice:
        """Where the ranks of module `index` lie on the last axis of `scores` and `kept`."""
        return slice(self._ends[index] - self.modules[index].rank, self._ends[index])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(module.rank for module in self.modules))

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For every module by name, which ranks the last standing decision kept; all before the first."""
        kept = [True] * self.total_ranks if not self.standing else self.standing[-1].kept.tolist()
        return {module.name: kept[self.part(index)] for index, module in enumerate(self.modules)}


def read_log(path: str | os.PathLike[str]) -> RunLog:
    """Read a log, also while it is being written: a torn end is left out (`RunLog.torn`). Needs numpy.

    Raises:
        LogError: For what is no decision log; a ValueError that names file and line.
        OSError: Where the file cannot be read.
    """
    path = Path(path)
    entries, torn = scan(path)
    if not entries:
        raise LogError(f"{path}: found no start of a decision log, expected one in the first line")
    start = entries[0].lines[0]
    modules = tuple(_module(path, item) for item in start["modules"])
    undone = _undone(entries)
    decisions = []
    events = []
    for entry, gone in zip(entries, undone, strict=True):
        if entry.event == RANKS:
            decisions.append(_decision(path, entry, modules, gone))
        elif entry.event != START:
            line = entry.lines[0]
            details = {name: value for name, value in line.items() if name not in _OWN_FIELDS}
            events.append(LoggedEvent(entry.step, entry.event, details, gone))
    facts = {name: value for name, value in start.items() if name != "event"}
    return RunLog(path, facts, modules, tuple(decisions), tuple(events), torn)


def _undone(entries: Sequence[Entry]) -> list[bool]:
    """Return for each entry True if a rollback after it returned to a step before it; rollbacks themselves stand."""
    earliest: float = float("inf")
    undone = []
    for entry in reversed(entries):
        if entry.event == "rollback":
            undone.append(False)
            earliest = min(earliest, entry.reached)
        else:
            undone.append(entry.step > earliest)
    return undone[::-1]


def _module(path: Path, item: Mapping[str, Any]) -> LoggedModule:
    where = f"{path}, line 1: cost of {item['name']!r}"
    try:
        cost = float(check_number(item.get("cost", 1.0), where))
    except ValueError as error:
        raise LogError(str(error)) from None
    if not 0 <= cost <= MOST:
        raise LogError(f"{where}: found {cost}, expected a number from 0 to {MOST}")
    return LoggedModule(
        item["name"],
        item["rank"],
        item.get("in_features"),
        item.get("out_features"),
        str(item.get("group") or ""),
        cost,
    )


def _decision(path: Path, entry: Entry, modules: Sequence[LoggedModule], undone: bool) -> LoggedDecision:
    import numpy as np

    scored = "scores" in entry.lines[0]
    scores: list[float] = []
    kept: list[bool] = []
    thresholds: list[float] = []
    for index, (line, module) in enumerate(zip(entry.lines, modules, strict=True)):
        try:
            for name in ("scores", "kept") if scored else ("kept",):
                found = line.get(name)
                if not isinstance(found, list) or len(found) != module.rank:
                    raise ValueError(f"found {name} {found!r}, expected a list of {module.rank}")
            if not all(isinstance(keep, bool) for keep in line["kept"]):
                raise ValueError(f"found kept {shown(line['kept'])}, expected true or false for each rank")
            scores += [_number(score, "scores") for score in line["scores"]] if scored else [nan] * module.rank
            kept += line["kept"]
            thresholds.append(_number(line.get("threshold"), "threshold"))
            budget = float(check_number(line.get("budget"), "budget"))
        except ValueError as error:
            raise LogError(f"{path}, line {entry.first + index}: {error}") from None
    arrays = np.array(thresholds), np.array(scores), np.array(kept, dtype=bool)
    return LoggedDecision(entry.step, budget, *arrays, scored, undone)


def _number(value: Any, field: str) -> float:
    try:
        return number(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
