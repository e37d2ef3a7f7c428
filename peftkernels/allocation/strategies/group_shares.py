"""Allocation by shares of the budget that groups of modules have and that can be moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.budget.module_groups import group_modules
from peftkernels.allocation.strategies.composed import Composed
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

# Of the budget, what a group keeps at least, so that it can grow again.
LEAST_SHARE = 0.01


class GroupShares(Composed):
    """Each group of modules has a share of the budget; inside it the ranks that score highest by `inner` stay.

    Score of a rank: share of its group over what it and the ranks before it, by inner score, cost together. The highest
    scores under a budget are then, whatever the budget, each group's best ranks in proportion to its share (d'Hondt's
    method), and what a group cannot use falls to the others.

    A rank whose inner score is not finite comes last in its group, and has none here either.

    Shares are at first in proportion to what the groups' ranks cost, and change by `move` alone.

    Args:
        inner: Scores the ranks of a group.
        groups: Shell patterns by name of the group; by default projection types, see `group_modules`.
    """

    name = "shares"

    def __init__(self, inner: Strategy, groups: Mapping[str, str | Sequence[str]] | None = None) -> None:
        super().__init__(inner)
        # Moves are made on the host.
        self.capturable = False
        self.groups = None if groups is None else dict(groups)
        self._moves: list[Mapping[str, Any]] = []

    def begin(self, statistics: Statistics) -> None:
        super().begin(statistics)
        members = group_modules(statistics.names, self.groups)
        self.labels = list(members)
        index = torch.zeros(len(statistics.names), dtype=torch.int64)
        for number, positions in enumerate(members.values()):
            index[list(positions)] = number
        self.group_index = index.to(statistics.device)[statistics.module_index]
        full = torch.zeros(len(members), dtype=torch.float64).index_add(
            0, self.group_index.cpu(), statistics.costs.cpu()
        )
        self.full_cost = float(full.sum())
        self._shares = full / full.sum()

    @property
    def shares(self) -> dict[str, float]:
        """Each group's share of the budget by name."""
        return dict(zip(self.labels, self._shares.tolist(), strict=True))

    @property
    def arms(self) -> list[tuple[int, int] | None]:
        """The possible actions: None, or a move from one group to another, by their positions in `labels`."""
        count = len(self.labels)
        return [None, *((a, b) for a in range(count) for b in range(count) if a != b)]

    def has_to_give(self, group: int) -> bool:
        """Return True if a move from the group would move anything."""
        return float(self._shares[group]) > LEAST_SHARE

    def move(self, giver: int, taker: int, amount: float) -> float:
        """Move `amount` of the whole budget from one group to another, as far as it has it; returns what was moved."""
        amount = min(amount, max(0.0, float(self._shares[giver]) - LEAST_SHARE))
        self._shares[giver] -= amount
        self._shares[taker] += amount
        self._moves.append(
            {"from": self.labels[giver], "to": self.labels[taker], "share": amount, "shares": self.shares}
        )
        return amount

    def scores(self, statistics: Statistics) -> Tensor:
        given = super().scores(statistics)
        usable = torch.isfinite(given)
        inner = torch.where(usable, given, -torch.inf)
        scores = torch.zeros_like(inner, dtype=torch.float64)
        shares = self._shares.to(inner.device)
        for group in range(len(self.labels)):
            own = torch.nonzero(self.group_index == group).flatten()
            order = own[torch.sort(inner[own], descending=True, stable=True).indices]
            scores[order] = shares[group] / torch.cumsum(statistics.costs[order], 0)
        return torch.where(usable, scores, torch.nan)

    def moved(self) -> list[Mapping[str, Any]]:
        moves, self._moves = [*self._moves, *super().moved()], []
        return moves

    def tensors(self) -> Mapping[str, Tensor]:
        return {**super().tensors(), "shares": self._shares}

    def load(self, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        super().load(tensors, statistics)
        self._shares.copy_(tensors["shares"])
        self._moves.clear()

    def facts(self) -> dict[str, Any]:
        return {"groups": self.groups, **super().facts()}
