"""A small part of a test's parametrisations that still has every pair of values, for what is slow to run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations


def pairs(values: dict[str, Hashable]) -> set[tuple[tuple[str, Hashable], ...]]:
    """Every two of the values, or the only one."""
    return set(combinations(sorted(values.items(), key=lambda item: item[0]), min(2, len(values))))


def covering(parametrisations: Sequence[dict[str, Hashable]]) -> list[int]:
    """Places of parametrisations (name: value) that together have every pair of values.

    Most faults need one or two parameters to be what they are: where all pairs were run, few of them are left (Kuhn,
    Wallace and Gallo, "Software fault interactions and implications for software testing", IEEE TSE 2004). Greedy: the
    one with the most pairs that none before it had, the first of several.
    """
    uncovered = {place: pairs(values) for place, values in enumerate(parametrisations)}
    chosen: list[int] = []
    while True:
        place = max(uncovered, key=lambda one: len(uncovered[one]), default=None)
        if place is None or not uncovered[place]:
            return chosen or list(range(min(1, len(parametrisations))))
        chosen.append(place)
        new = uncovered.pop(place)
        for left in uncovered.values():
            left -= new
