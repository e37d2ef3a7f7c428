"""What a search over budgets may choose, and what one choice means to an allocator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkernels.allocation.budget.budgets import REST, Budget, Group

Range = tuple[float, float]
# A group gets at most so many times, and at least so little of, what its share of the layers would give it.
GROUP_WEIGHTS = (0.25, 4.0)


@dataclass(frozen=True)
class Candidate:
    """One choice: how to build the layers and the allocator.

    Attributes:
        init_r: Rank at the start, for `AdaLoRALinear.from_linear`.
        lora_alpha: For `AdaLoRALinear.from_linear`.
        target_r: Average rank per layer at the end.
        tinit: Share of the run before the budget falls.
        tfinal: Share of the run after it has fallen.
        deltaT: Optimizer steps between two masks.
        learning_rate: Of the adapters; None where the space does not range over it.
        group_weights: By group, how much more than its share of the ranks it gets; normalised in `budget`.
    """

    init_r: int
    lora_alpha: float
    target_r: int
    tinit: float
    tfinal: float
    deltaT: int
    learning_rate: float | None = None
    group_weights: Mapping[str, float] = field(default_factory=dict, hash=False)

    def schedule(self, total_step: int) -> dict[str, int]:
        """`total_step`, `tinit`, `tfinal` and `deltaT` of an allocator for a run of so many optimizer steps."""
        if total_step < 4:
            raise ValueError(f"total_step: found {total_step}, expected at least 4")
        tfinal = min(int(self.tfinal * total_step), total_step - 3)
        tinit = min(int(self.tinit * total_step), total_step - tfinal - 2)
        return {"total_step": total_step, "tinit": tinit, "tfinal": tfinal, "deltaT": self.deltaT}

    def budget(self, groups: Mapping[str, Sequence[str]], layers: Sequence[str]) -> Budget:
        """The budget in ranks over `layers` (module paths): target_r times their number, shared between the groups in
        proportion to their layers times their weights.

        groups: shell patterns over module paths by group; layers in none form the rest, whose weight is 1. No group
        gets more than one rank less than all it has; what it cannot use goes to the others.
        """
        if not groups:
            return Budget(self.target_r * len(layers))
        members = dict.fromkeys(groups, 0)
        rest = 0
        for layer in layers:
            own = next((name for name, patterns in groups.items() if Group(patterns, 1).has(layer)), None)
            if own is None:
                rest += 1
            else:
                members[own] += 1
        sizes = {**members, **({REST: rest} if rest else {})}
        totals = _share_out(
            self.target_r * len(layers),
            {name: size * self.group_weights.get(name, 1.0) for name, size in sizes.items()},
            {name: size * self.init_r - 1 for name, size in sizes.items()},
        )
        return Budget(
            totals.get(REST), groups={name: Group(patterns, totals[name]) for name, patterns in groups.items()}
        )


@dataclass(frozen=True)
class BudgetSpace:
    """The choices of a search. A pair (low, high) is a range, both ends included; a single value is fixed.

    Attributes:
        init_r: Rank at the start, drawn from its logarithm.
        target_share: target_r as a share of init_r (below 1, so that there is something to prune).
        alpha_per_rank: The scale of the adapter, lora_alpha / init_r, drawn from its logarithm.
        tinit: Share of the run before the budget falls.
        tfinal: Share of the run after it has fallen.
        deltaT: The values to choose from.
        learning_rate: Drawn from its logarithm; None leaves it to the objective.
        groups: Shell patterns over module paths by group; each group's weight is searched.
    """

    init_r: int | tuple[int, int] = (4, 16)
    target_share: float | Range = (0.25, 0.75)
    alpha_per_rank: float | Range = (1.0, 8.0)
    tinit: float | Range = (0.0, 0.3)
    tfinal: float | Range = (0.1, 0.5)
    deltaT: Sequence[int] = (1, 5, 10)
    learning_rate: float | Range | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("init_r", 2, math.inf),
            ("target_share", 0.0, 1.0),
            ("alpha_per_rank", 0.0, math.inf),
            ("tinit", 0.0, 1.0),
            ("tfinal", 0.0, 1.0),
            ("learning_rate", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            low, high = _ends(value)
            if not (math.isfinite(low) and math.isfinite(high) and lowest <= low <= high <= highest):
                raise ValueError(
                    f"{name}: found {value!r}, expected a number or a pair low <= high in [{lowest}, {highest}]"
                )
        if not self.deltaT or any(not isinstance(value, int) or value < 1 for value in self.deltaT):
            raise ValueError(f"deltaT: found {self.deltaT!r}, expected whole numbers of at least 1 to choose from")

    def draw(self, trial: Any) -> Candidate:
        """The candidate that an `optuna.Trial` suggests."""
        init_r = int(_number(trial, "init_r", self.init_r, log=True, whole=True))
        share = _number(trial, "target_share", self.target_share)
        return Candidate(
            init_r=init_r,
            lora_alpha=init_r * _number(trial, "alpha_per_rank", self.alpha_per_rank, log=True),
            target_r=min(init_r - 1, max(1, round(share * init_r))),
            tinit=_number(trial, "tinit", self.tinit),
            tfinal=_number(trial, "tfinal", self.tfinal),
            deltaT=self.deltaT[0] if len(self.deltaT) == 1 else trial.suggest_categorical("deltaT", list(self.deltaT)),
            learning_rate=(
                None if self.learning_rate is None else _number(trial, "learning_rate", self.learning_rate, log=True)
            ),
            group_weights={
                name: trial.suggest_float(f"weight of {name}", *GROUP_WEIGHTS, log=True) for name in self.groups
            },
        )

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate of a trial's parameters by name, as Optuna and other searchers keep them."""
        return self.draw(_Fixed(params))


class _Fixed:
    """Suggests what was chosen before."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def suggest_int(self, name: str, *range_: Any, log: bool = False) -> Any:
        return self._params[name]

    suggest_float = suggest_categorical = suggest_int


def _ends(value: float | Range) -> Range:
    return value if isinstance(value, tuple) else (value, value)


def _number(trial: Any, name: str, value: float | Range, *, log: bool = False, whole: bool = False) -> float:
    low, high = _ends(value)
    if low == high:
        return low
    suggest = trial.suggest_int if whole else trial.suggest_float
    number: float = suggest(name, low, high, log=log)
    return number


def _share_out(total: int, weights: Mapping[str, float], most: Mapping[str, int]) -> dict[str, int]:
    """Whole shares of `total`, at least 1 each and at most `most`, as near to the weights as that allows."""
    shares = dict.fromkeys(weights, 1)
    for _ in range(total - len(shares)):
        open_groups = [name for name in shares if shares[name] < most[name]]
        if not open_groups:
            break
        # The one that is furthest below its share, the first of equals (Jefferson's rule).
        neediest = max(open_groups, key=lambda name: weights[name] / (shares[name] + 1))
        shares[neediest] += 1
    return shares
