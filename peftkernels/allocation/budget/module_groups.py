"""Groups of modules that budgets are moved between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from peftkernels.allocation.budget.budgets import Group

STRETCHES = 4


def group_modules(
    names: Sequence[str], groups: Mapping[str, str | Sequence[str]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return positions in `names` by group, every module in one of at least two.

    Args:
        names: Module paths.
        groups: Shell patterns by name of the group; a module belongs to the first that has it. None: by projection
            type, the last part of a module path that is no number ("q_proj", "dense"); where all are of one type, up to
            four stretches of consecutive modules ("modules 0-8", …).

    Raises:
        ValueError: For a module in no group, a group without modules, and where there are not two groups.
    """
    if groups is not None:
        rules = {label: Group(patterns, 1) for label, patterns in groups.items()}
        owner = [next((label for label, rule in rules.items() if rule.has(name)), None) for name in names]
        lost = [name for name, label in zip(names, owner, strict=True) if label is None]
        if lost:
            raise ValueError(f"groups: found none for {lost[0]!r}, expected every module in one")
        empty = [label for label in rules if label not in owner]
        if empty:
            raise ValueError(f"groups[{empty[0]!r}]: found no module for {groups[empty[0]]!r}")
        found = {label: tuple(i for i, own in enumerate(owner) if own == label) for label in rules}
    else:
        types = [projection_type(name) for name in names]
        found = {kind: tuple(i for i, own in enumerate(types) if own == kind) for kind in dict.fromkeys(types)}
        if len(found) == 1:
            count = min(STRETCHES, len(names))
            cuts = [round(stretch * len(names) / count) for stretch in range(count + 1)]
            found = {f"modules {a}-{b - 1}": tuple(range(a, b)) for a, b in pairwise(cuts)}
    if len(found) < 2:
        raise ValueError(f"groups: found {len(found)}, expected at least two to move budget between")
    return found


def projection_type(name: str) -> str:
    """Return the last part of a module path that is no number; the whole path where all are."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return parts[-1] if parts else name
