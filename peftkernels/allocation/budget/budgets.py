"""What a budget is counted in, and which layers share one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from peftkernels.allocation.budget.schedule import CubicSchedule

UNITS = ("ranks", "parameters", "microseconds", "bytes")
# Units whose costs the user gives, and what gives them: they are not to be seen from a layer's shape.
GIVEN_COSTS = {"microseconds": "measured_costs", "bytes": "byte_costs"}
REST = "rest"


@dataclass(frozen=True)
class Group:
    """Layers with a budget of their own.

    Attributes:
        modules: Shell patterns over module paths, such as "*.attention.*"; a layer belongs to the first group that has
            it.
        total: What the group may cost at the end, in the unit of the budget it is part of.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    modules: str | Sequence[str]
    total: float

    def __post_init__(self) -> None:
        patterns = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ValueError(f"modules: found {self.modules!r}, expected at least one pattern such as '*.attention.*'")
        object.__setattr__(self, "modules", patterns)
        _check_total(self.total)
        object.__setattr__(self, "total", _plain(self.total))

    def has(self, name: str) -> bool:
        """Return True if a module path matches one of the patterns."""
        return any(fnmatchcase(name, pattern) for pattern in self.modules)


@dataclass(frozen=True)
class Budget:
    """What the kept ranks of a model may cost at the end of the decreasing phase.

    The budget at the start is what all ranks together cost; in between it falls along `CubicSchedule`.

    Attributes:
        total: For all layers that are in no group; None where every layer is in one.
        unit: "ranks" counts them. "parameters": a rank of a layer (N, K) costs N + K + 1. "microseconds": what a rank
            that is not DEAD adds to forward and backward on this machine, by the costs given to the allocator
            (`peftkernels.allocation.costs.measured_costs`). "bytes": what it takes in the adapter that is saved, by
            costs given likewise (`peftkernels.allocation.costs.byte_costs`).
        groups: By name, the layers with budgets of their own.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    total: float | None = None
    unit: str = "ranks"
    groups: Mapping[str, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit: found {self.unit!r}, expected one of {', '.join(UNITS)}")
        if self.total is None and not self.groups:
            raise ValueError("total: found None without groups, expected a number")
        if self.total is not None:
            _check_total(self.total)
            object.__setattr__(self, "total", _plain(self.total))
        if not isinstance(self.groups, Mapping):
            raise TypeError(f"groups: found {type(self.groups).__name__}, expected a mapping of names to Groups")
        # A copy in a plain dict: the argument may change later, or be of a kind that is not saved.
        object.__setattr__(self, "groups", dict(self.groups))
        for name, group in self.groups.items():
            if not isinstance(name, str):
                raise TypeError(f"groups: found the name {name!r}, expected a str")
            if not isinstance(group, Group):
                raise TypeError(f"groups[{name!r}]: found {type(group).__name__}, expected a Group")
            if name == REST:
                raise ValueError(f"groups: found the name {REST!r}, which stands for the layers in no group")


@dataclass(frozen=True)
class Share:
    """One budget over some of the layers.

    Attributes:
        name: The group's name, or "rest".
        members: The layers' positions in model order.
        schedule: How the budget falls.
    """

    name: str
    members: tuple[int, ...]
    schedule: CubicSchedule


@dataclass(frozen=True)
class Shares:
    """A budget bound to layers.

    Attributes:
        unit: What the budget is counted in.
        costs: What one rank of each layer costs in `unit`, in model order.
        shares: One per group that has layers, and one for the rest.
    """

    unit: str
    costs: tuple[float, ...]
    shares: tuple[Share, ...]

    @property
    def uniform(self) -> bool:
        """True if every rank costs one, so that costs need not be looked at."""
        return all(cost == 1 for cost in self.costs)

    def prices(self, share: int) -> list[float]:
        """Return the different costs of a rank in one of the shares."""
        return sorted({self.costs[member] for member in self.shares[share].members})

    def budget(self, step: int) -> float:
        """Return the budget of all shares together after optimizer step `step`."""
        return sum(share.schedule(step)[0] for share in self.shares)

    def due(self, step: int) -> bool:
        """Return True if ranks are masked after optimizer step `step`; the same for all shares."""
        return self.shares[0].schedule(step)[1]


def share_out(
    budget: Budget,
    layers: Mapping[str, tuple[int, int, int]],
    *,
    tinit: int,
    last_allocation: int,
    deltaT: int,
    costs: Mapping[str, float] | None = None,
) -> Shares:
    """Bind a budget to layers.

    Ranks and parameters are counted in whole numbers, and a fraction of a total is lost.

    Args:
        budget: The budget.
        layers: (r, N, K) by name.
        tinit: Steps before the first mask.
        last_allocation: The step after which the ranks no longer change.
        deltaT: Steps between two masks.
        costs: What one rank costs by layer, for a budget in microseconds or bytes.

    Raises:
        ValueError: For a group without layers or with a pattern that matches none, a layer in no group where
            `budget.total` is None, a total that leaves nothing to prune or does not reach for one rank, and costs that
            are missing or not positive.
    """
    per_rank = _costs(budget.unit, layers, costs)
    members: dict[str, list[int]] = {name: [] for name in budget.groups}
    rest: list[int] = []
    for index, name in enumerate(layers):
        own = next((group for group, rule in budget.groups.items() if rule.has(name)), None)
        (rest if own is None else members[own]).append(index)
    for name, group in budget.groups.items():
        unused = [pattern for pattern in group.modules if not any(fnmatchcase(layer, pattern) for layer in layers)]
        if unused:
            raise ValueError(
                f"budget: found no layer for the pattern {unused[0]!r} of group {name!r}; "
                f"layers: {_shown(list(layers))}"
            )
    empty = [name for name, indices in members.items() if not indices]
    if empty:
        raise ValueError(
            f"budget: found no layer for the groups {', '.join(empty)} that an earlier group does not have; "
            f"layers: {_shown(list(layers))}"
        )
    totals = {name: group.total for name, group in budget.groups.items()}
    if rest:
        if budget.total is None:
            raise ValueError(
                f"budget: found no group for {_shown([list(layers)[i] for i in rest])}, expected total for the rest"
            )
        members[REST], totals[REST] = rest, budget.total
    elif budget.total is not None:
        raise ValueError("budget: found a total for the rest, but every layer is in a group")
    whole = budget.unit != "microseconds"
    ranks = [r for r, _, _ in layers.values()]
    shares = []
    for name, indices in members.items():
        initial = sum(ranks[index] * per_rank[index] for index in indices)
        label = "budget" if name == REST and len(members) == 1 else f"budget of {name!r}"
        if totals[name] >= initial:
            raise ValueError(
                f"{label}: found {totals[name]:g} {budget.unit}, expected less than the {initial:g} of all ranks"
            )
        cheapest = min(per_rank[index] for index in indices if ranks[index])
        if totals[name] < cheapest:
            raise ValueError(
                f"{label}: found {totals[name]:g} {budget.unit}, expected at least the {cheapest:g} of one rank"
            )
        schedule = CubicSchedule(
            int(initial) if whole else initial,
            int(totals[name]) if whole else totals[name],
            tinit,
            last_allocation,
            deltaT,
            whole,
        )
        shares.append(Share(name, tuple(indices), schedule))
    return Shares(budget.unit, tuple(per_rank), tuple(shares))


def _costs(unit: str, layers: Mapping[str, tuple[int, int, int]], costs: Mapping[str, float] | None) -> list[float]:
    if unit == "ranks":
        return [1] * len(layers)
    if unit == "parameters":
        return [n + k + 1 for _, n, k in layers.values()]
    if costs is None:
        raise ValueError(
            f"costs: found None, expected {unit} by layer for a budget in {unit}, as "
            f"peftkernels.allocation.costs.{GIVEN_COSTS[unit]}(model) gives them"
        )
    missing = [name for name in layers if name not in costs]
    if missing:
        raise ValueError(f"costs: found none for {_shown(missing)}")
    wrong = [name for name in layers if not (math.isfinite(costs[name]) and costs[name] > 0)]
    if wrong:
        raise ValueError(f"costs[{wrong[0]!r}]: found {costs[wrong[0]]}, expected a finite number above 0")
    return [float(costs[name]) for name in layers]


def _check_total(total: float) -> None:
    if not isinstance(total, (int, float)) or isinstance(total, bool):
        raise TypeError(f"total: found {total!r} ({type(total).__name__}), expected a number")
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"total: found {total}, expected a finite number above 0")


def _plain(total: float) -> float:
    """The number itself where it comes as a subclass, such as numpy's: states hold plain ones."""
    return int(total) if isinstance(total, int) else float(total)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
