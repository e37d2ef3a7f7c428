"""What became of every rank in a run, counted from its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from peftkernels._reading import is_number
from peftkernels.allocation.logs.run_log import LoggedEvent, RunLog

MOST_COLUMNS = 1200


@dataclass(frozen=True)
class ModuleRow:
    """One layer at the end of the log.

    Attributes:
        kept: ACTIVE ranks.
        rank: ranks at the start.
        score: sum of its rank scores; None where there are none, or it is not finite.
        nearest: least distance of one of its scores from the threshold; None where there is no finite threshold.
        revived: how often one of its ranks came back after having been masked.
        changed: the step of the last decision that changed one of its ranks; None where none did.
        frozen: the step at which it was frozen, None where it was not.
        threshold: at or below which its scores were masked; None before the first decision and where nothing was.
        scores: of each rank; empty where none were logged.
        keeps: True for each rank that stayed; empty where no scores were logged.

    Scores and what follows from them are those of the last decision whose scores were logged, `History.scored`.
    """

    name: str
    group: str
    rank: int
    kept: int
    score: float | None
    nearest: float | None
    revived: int
    changed: int | None
    frozen: int | None
    threshold: float | None
    scores: tuple[float, ...]
    keeps: tuple[bool, ...]


class History:
    """A log's standing decisions (D of them, over M modules) counted.

    Attributes:
        active: (D, M) ACTIVE ranks by module.
        masked, revived: (D,) ranks masked, and brought back, since the decision before. The first decision is compared
            with all ranks ACTIVE; of a log that begins in the middle of a run it has nothing to be compared with: zero.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log
        kept = log.kept
        starts = np.cumsum([0, *(module.rank for module in log.modules[:-1])])
        self.active = np.add.reduceat(kept.astype(np.int64), starts, axis=1)
        whole = log.first_step == 0 or not len(kept)
        first = np.ones((1, log.total_ranks), dtype=bool) if whole else kept[:1]
        before = np.concatenate([first, kept])[:-1]
        self._lost, self._back = before & ~kept, kept & ~before
        self.masked = self._lost.sum(1)
        self.revived = self._back.sum(1)

    @property
    def churn(self) -> np.ndarray:
        """(D,) ranks that changed state at each decision."""
        return self.masked + self.revived

    @property
    def active_now(self) -> int:
        """ACTIVE ranks at the end of the log."""
        return int(self.active[-1].sum()) if len(self.active) else self.log.total_ranks

    @cached_property
    def spent(self) -> np.ndarray:
        """(D,) what the ACTIVE ranks take of the budget, in its unit."""
        costs = np.array([module.cost for module in self.log.modules])
        return np.asarray(self.active @ costs)

    @property
    def spent_at_first(self) -> float:
        """What all ranks together would take of the budget."""
        return sum(module.cost * module.rank for module in self.log.modules)

    def over_time(self) -> tuple[np.ndarray, tuple[float, float]]:
        """ACTIVE ranks at evenly spaced steps (times × M, at most 1200 times), and the steps at the edges of the first
        and last; between decisions they stay, before the first all are ACTIVE."""
        first, last = self.log.first_step + 1, max(self.log.last_step, self.log.first_step + 1)
        columns = min(MOST_COLUMNS, last - first + 1)
        times = np.linspace(first, last, columns)
        at_start = np.array([[module.rank for module in self.log.modules]])
        rows = np.concatenate([at_start, self.active])
        half = 0.5 * (last - first) / max(1, columns - 1) if columns > 1 else 0.5
        return rows[np.searchsorted(self.log.steps, times, side="right")], (first - half, last + half)

    @cached_property
    def rows(self) -> list[ModuleRow]:
        """One for each module, in the order of the log."""
        log = self.log
        frozen = {str(e.details.get("module")): e.step for e in self.events("frozen") if not e.undone}
        at = self.scored
        rows = []
        for index, module in enumerate(log.modules):
            part = log.part(index)
            scores = () if at is None else tuple(map(float, log.scores[at, part]))
            keeps = () if at is None else tuple(map(bool, log.kept[at, part]))
            changes = np.flatnonzero((self._lost[:, part] | self._back[:, part]).any(1))
            threshold = None if at is None else _finite(float(log.thresholds[at, index]))
            distances = [abs(score - threshold) for score in scores] if threshold is not None else []
            rows.append(
                ModuleRow(
                    name=module.name,
                    group=module.group,
                    rank=module.rank,
                    kept=int(log.kept[-1, part].sum()) if log.standing else module.rank,
                    score=_finite(sum(scores)) if scores else None,
                    nearest=_finite(min(distances)) if distances else None,
                    revived=int(self._back[:, part].sum()),
                    changed=int(log.steps[changes[-1]]) if len(changes) else None,
                    frozen=frozen.get(module.name),
                    threshold=threshold,
                    scores=scores,
                    keeps=keeps,
                )
            )
        return rows

    @cached_property
    def scored(self) -> int | None:
        """Which of the standing decisions is the last whose scores were logged."""
        found = [index for index, decision in enumerate(self.log.standing) if decision.scored]
        return found[-1] if found else None

    @cached_property
    def thresholds(self) -> dict[str, np.ndarray]:
        """(D,) the thresholds of each group; of one group where all have the same."""
        found = {module.group: self.log.thresholds[:, index] for index, module in enumerate(self.log.modules)}
        first = next(iter(found.values()))
        same = all(np.array_equal(values, first) for values in found.values())
        return {"": first} if same else found

    def groups(self) -> dict[str, tuple[int, int]]:
        """ACTIVE ranks and all ranks of each group."""
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            active, total = sums.get(row.group, (0, 0))
            sums[row.group] = (active + row.kept, total + row.rank)
        return sums

    def events(self, kind: str) -> list[LoggedEvent]:
        """The events of one kind, those that were rolled back included."""
        return [event for event in self.log.events if event.kind == kind]

    def losses(self) -> tuple[list[int], list[float]]:
        """Steps and losses that the log has, those rolled back left out."""
        found = [e for e in self.events("loss") if not e.undone and is_number(e.details.get("value"))]
        return [event.step for event in found], [float(event.details["value"]) for event in found]

    def as_dict(self) -> dict[str, Any]:
        """Everything counted here in plain containers, for JSON."""
        log = self.log
        return {
            "strategy": log.strategy,
            "settings": log.facts.get("settings", {}),
            "unit": log.unit,
            "first_step": log.first_step,
            "last_step": log.last_step,
            "torn": log.torn,
            "ranks": {"live": self.active_now, "total": log.total_ranks},
            "decisions": {
                "step": log.steps.tolist(),
                "budget": log.budgets.tolist(),
                "spent": self.spent.tolist(),
                "threshold": {
                    group: [_finite(value) for value in values.tolist()] for group, values in self.thresholds.items()
                },
                "live": self.active.sum(1).tolist(),
                "masked": self.masked.tolist(),
                "revived": self.revived.tolist(),
            },
            "modules": [{**vars(row), "scores": [_finite(score) for score in row.scores]} for row in self.rows],
            "groups": {group: {"live": active, "total": total} for group, (active, total) in self.groups().items()},
            "events": [vars(event) for event in log.events if event.kind != "loss"],
        }


def common_share(patterns: Sequence[dict[str, list[bool]]]) -> list[list[float | None]]:
    """For each pair of patterns the ranks that both keep, over those that either keeps; None for other layers."""

    shapes = [[(name, len(kept)) for name, kept in sorted(pattern.items())] for pattern in patterns]
    masks = [np.array([keep for name in sorted(pattern) for keep in pattern[name]], dtype=bool) for pattern in patterns]

    def share(one: int, other: int) -> float | None:
        if shapes[one] != shapes[other]:
            return None
        either = int((masks[one] | masks[other]).sum())
        return int((masks[one] & masks[other]).sum()) / either if either else None

    places = range(len(patterns))
    return [[share(one, other) for other in places] for one in places]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
