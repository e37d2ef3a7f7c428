"""Allocation that starts from what an earlier run found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.strategies.composed import Composed
from peftkernels.allocation.strategies.rank_prior import RankPrior, gated_shapes
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class Prior(Composed):
    """Scores that move from those of an earlier run's pattern to those of `inner`:

        score = (1 - w)·q(inner score) + w·q(p_k / place),    w = weight · 2^(-t/half_life) after t optimizer steps

    with q the quantile among all ranks (equal ones have equal quantiles), p_k the part of the kept ranks that the prior
    expects in layer k (`RankPrior.expected`), and place = 1, 2, … of the rank in its layer by inner score. With w = 1
    the layers keep ranks in the prior's proportions (d'Hondt's method), whatever the budget, with w = 0 the inner
    strategy decides. Early scores are made of few gradients: that is when a prior is worth most. The rule is this
    package's own; start layers themselves with uneven ranks by `initial_ranks`.

    A rank whose inner score is not finite comes last in its layer, and has none here either.

    Args:
        inner: Scores ranks by this run.
        prior: The earlier run's pattern.
        weight: The prior's weight at the start, from 0 to 1.
        half_life: Steps in which that halves, above 0.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    name = "prior"

    def __init__(self, inner: Strategy, prior: RankPrior, weight: float = 1.0, half_life: float = 100.0) -> None:
        super().__init__(inner)
        if not isinstance(prior, RankPrior):
            raise TypeError(f"prior: found {type(prior).__name__}, expected a RankPrior")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: found {weight}, expected a number from 0 to 1")
        if not half_life > 0:
            raise ValueError(f"half_life: found {half_life}, expected a number of steps above 0")
        self.prior, self.weight, self.half_life = prior, weight, half_life

    def begin(self, statistics: Statistics) -> None:
        super().begin(statistics)
        expected = self.prior.expected(gated_shapes(statistics.names, statistics.layers))
        self._expected = statistics.spread([expected[name] for name in statistics.names])
        # Made here, and kept: a captured step cannot make what comes from the host.
        _ = statistics.module_index
        starts = [sum(statistics.ranks[:layer]) for layer in range(len(statistics.ranks))]
        self._starts = statistics.spread(starts).to(torch.int64)
        self._weight = torch.full((), self.weight, dtype=torch.float64, device=statistics.device)

    def update(self, statistics: Statistics) -> None:
        super().update(statistics)
        slower = self._weight * 2 ** (-1 / self.half_life)
        self._weight.copy_(slower if statistics.skip is None else torch.where(statistics.skip, self._weight, slower))

    def scores(self, statistics: Statistics) -> Tensor:
        given = super().scores(statistics)
        usable = torch.isfinite(given)
        inner = torch.where(usable, given, -torch.inf)
        order = torch.sort(inner, descending=True, stable=True).indices
        order = order[torch.sort(statistics.module_index[order], stable=True).indices]
        count = torch.arange(statistics.total, device=inner.device)
        place = torch.empty_like(count).scatter_(0, order, count - self._starts[order] + 1)
        scores = (1 - self._weight) * quantiles(inner) + self._weight * quantiles(self._expected / place)
        return torch.where(usable, scores, torch.nan)

    def tensors(self) -> Mapping[str, Tensor]:
        return {**super().tensors(), "weight": self._weight}

    def load(self, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        super().load(tensors, statistics)
        self._weight.copy_(tensors["weight"])

    def facts(self) -> dict[str, Any]:
        modules = [asdict(module) for module in self.prior.modules]
        return {"prior": modules, "weight": self.weight, "half_life": self.half_life, **super().facts()}


def quantiles(values: Tensor) -> Tensor:
    """Return for each value (n,) the part of all that is below it, equal ones counted half; float64 in (0, 1)."""
    ordered = torch.sort(values).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * values.numel())
