"""Rank patterns of earlier runs as a prior: saved with the architecture, matched by projection and relative depth."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn

from peftkernels._module_names import named_modules
from peftkernels._reading import check_number, check_object, check_text, check_whole, shown
from peftkernels.allocation.budget.module_groups import projection_type
from peftkernels.allocation.files import read_kind, write_json
from peftkernels.allocation.layers.gated import GatedLayer

_KIND = "peftkernels rank pattern"


class DecidedRanks(Protocol):
    """What of an allocator a prior is made of."""

    @property
    def layers(self) -> Mapping[str, GatedLayer]:
        """The layers by name."""
        ...

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Return for every layer which ranks the last decision kept."""
        ...


@dataclass(frozen=True)
class PriorModule:
    """A module of an earlier run.

    Attributes:
        kind: Its projection type, the last part of its path that is no number ("q_proj").
        depth: Its place among the modules of its kind, from 0 for the first to 1 for the last; 1/2 for a single one.
        n: N, rows of its weight.
        k: K, columns of its weight.
        rank: Ranks it had at the start.
        kept: Ranks it had at the end.
    """

    kind: str
    depth: float
    n: int
    k: int
    rank: int
    kept: int

    def __post_init__(self) -> None:
        if not (0 <= self.depth <= 1 and self.n > 0 and self.k > 0 and 0 <= self.kept <= self.rank):
            raise ValueError(f"module: found {asdict(self)}, expected a depth in [0, 1] and 0 <= kept <= rank")


@dataclass(frozen=True)
class RankPrior:
    """The final ranks of one run.

    Attributes:
        modules: The modules, in model order.
    """

    modules: tuple[PriorModule, ...]

    @classmethod
    def of(cls, allocator: DecidedRanks) -> RankPrior:
        """Take what an allocator has decided last."""
        kept = {name: sum(own) for name, own in allocator.rank_pattern().items()}
        return cls.from_ranks(allocator.layers, kept)

    @classmethod
    def from_ranks(cls, layers: Mapping[str, GatedLayer], kept: Mapping[str, int]) -> RankPrior:
        """Make a prior of layers and of how many ranks each kept, by name.

        Raises:
            ValueError: Where the names differ, or a layer has kept more ranks than it has.
        """
        if layers.keys() != kept.keys():
            shown = ", ".join(sorted(layers.keys() ^ kept.keys())[:4])
            raise ValueError(f"kept: found other modules than the layers', expected the same: {shown}")
        depths = relative_depths(list(layers))
        return cls(
            tuple(
                PriorModule(
                    projection_type(name),
                    depths[name],
                    layer.lora_B.shape[0],
                    layer.lora_A.shape[1],
                    layer.lora_A.shape[0],
                    kept[name],
                )
                for name, layer in layers.items()
            )
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPrior:
        """Read the prior that `save` wrote.

        Raises:
            ValueError: For another file; names file and field.
        """
        modules = read_kind(path, _KIND).get("modules")
        where = f"{os.fspath(path)}: modules"
        if not isinstance(modules, list):
            raise ValueError(f"{where}: found {shown(modules)}, expected a list")
        return cls(tuple(_module(module, f"{where}[{index}]") for index, module in enumerate(modules)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a JSON file: all of it, or nothing."""
        write_json(path, {"kind": _KIND, "modules": [asdict(module) for module in self.modules]})

    def distance(self, layers: Mapping[str, tuple[int, int]]) -> float:
        """Return how far the run's architecture is from layers (N, K) by name, 0 for the same.

        It is infinite where a kind of theirs is missing, else the mean over kinds of
        |ln(N'/N)| + |ln(K'/K)| + |ln(m'/m)|, with the median shape of a kind and its number m of modules.
        """
        own, theirs = self._kinds(), _by_kind(layers)
        if not theirs.keys() <= own.keys():
            return math.inf
        away = 0.0
        for kind, names in theirs.items():
            mine = own[kind]
            shapes = torch.tensor([layers[name] for name in names], dtype=torch.float64).median(0).values
            known = torch.tensor([[module.n, module.k] for module in mine], dtype=torch.float64).median(0).values
            away += float((shapes / known).log().abs().sum()) + abs(math.log(len(names) / len(mine)))
        return away / len(theirs)

    def expected(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """Return the part of all kept ranks that each of the layers (N, K) would have, Σ = 1.

        It goes by the ranks kept by the modules of its kind, linearly between those before and behind its relative
        depth.

        Raises:
            ValueError: For a kind the run did not have, and where no rank was kept.
        """
        own, depths = self._kinds(), relative_depths(list(layers))
        values = {}
        for name in layers:
            kind = projection_type(name)
            if kind not in own:
                raise ValueError(f"layers[{name!r}]: found the kind {kind!r}, expected one of {', '.join(own)}")
            values[name] = _between([(module.depth, float(module.kept)) for module in own[kind]], depths[name])
        total = sum(values.values())
        if total <= 0:
            raise ValueError("prior: found a run that kept no rank of these kinds of modules")
        return {name: value / total for name, value in values.items()}

    def _kinds(self) -> dict[str, list[PriorModule]]:
        kinds: dict[str, list[PriorModule]] = {}
        for module in self.modules:
            kinds.setdefault(module.kind, []).append(module)
        return kinds


def _module(content: Any, where: str) -> PriorModule:
    module = check_object(content, where)
    names = [field.name for field in fields(PriorModule)]
    if module.keys() != set(names):
        raise ValueError(f"{where}: found the fields {shown(sorted(module))}, expected {', '.join(names)}")
    check_text(module["kind"], f"{where}.kind")
    check_number(module["depth"], f"{where}.depth")
    for name in ("n", "k", "rank", "kept"):
        check_whole(module[name], f"{where}.{name}")
    try:
        return PriorModule(**module)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def match(priors: Sequence[RankPrior], layers: Mapping[str, tuple[int, int]], *, farthest: float = 1.0) -> RankPrior:
    """Return the prior whose architecture is nearest to layers; the first of equally near ones.

    Args:
        priors: The priors to choose from.
        layers: (N, K) by name.
        farthest: The largest `RankPrior.distance` allowed.

    Raises:
        ValueError: Where none is within `farthest` (`RankPrior.distance`).
    """
    if not priors:
        raise ValueError("priors: found none, expected at least one")
    distances = [prior.distance(layers) for prior in priors]
    nearest = min(range(len(priors)), key=distances.__getitem__)
    if distances[nearest] > farthest:
        raise ValueError(
            f"priors: found the nearest at a distance of {distances[nearest]:g}, expected at most {farthest:g}"
        )
    return priors[nearest]


def initial_ranks(
    prior: RankPrior, layers: Mapping[str, tuple[int, int]], total: int, *, least: int = 1
) -> dict[str, int]:
    """Return the ranks to build layers with, Σ = total.

    Each has `least`; the others go in proportion to `RankPrior.expected`, by largest remainders, earlier layers first,
    but no layer has more than min(N, K).

    Args:
        prior: The earlier run's pattern.
        layers: (N, K) by name.
        total: All ranks together.
        least: The fewest of a layer.

    Raises:
        ValueError: For a total that cannot be shared out so.
    """
    room = {name: min(shape) - least for name, shape in layers.items()}
    rest = total - least * len(layers)
    if least < 0 or rest < 0 or min(room.values()) < 0 or rest > sum(room.values()):
        most = sum(min(shape) for shape in layers.values())
        raise ValueError(f"total: found {total}, expected from {least * len(layers)} to {most} for these layers")
    expected = prior.expected(layers)
    given = dict.fromkeys(layers, 0.0)
    while rest - sum(given.values()) > 1e-9:
        left = rest - sum(given.values())
        below = [name for name in layers if given[name] < room[name]]
        weights = {name: max(expected[name], 1e-12) for name in below}
        scale = left / sum(weights.values())
        for name in below:
            given[name] = min(float(room[name]), given[name] + scale * weights[name])
    ranks = {name: math.floor(value + 1e-9) for name, value in given.items()}
    by_remainder = sorted(layers, key=lambda name: ranks[name] - given[name])
    for name in by_remainder[: rest - sum(ranks.values())]:
        ranks[name] += 1
    return {name: least + rank for name, rank in ranks.items()}


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (N, K) of every nn.Linear of a model by name, for `match` and `initial_ranks` before it has adapters.

    Leave out those that will have none.
    """
    return {name: (m.out_features, m.in_features) for name, m in named_modules(model) if isinstance(m, nn.Linear)}


def gated_shapes(names: Sequence[str], layers: Sequence[GatedLayer]) -> dict[str, tuple[int, int]]:
    """Return (N, K) of gated layers by name."""
    return {name: (own.lora_B.shape[0], own.lora_A.shape[1]) for name, own in zip(names, layers, strict=True)}


def relative_depths(names: Sequence[str]) -> dict[str, float]:
    """Return each module's place among those of its kind, from 0 to 1."""
    depths = {}
    for members in _by_kind(dict.fromkeys(names, (0, 0))).values():
        for place, name in enumerate(members):
            depths[name] = place / (len(members) - 1) if len(members) > 1 else 0.5
    return depths


def _by_kind(layers: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(projection_type(name), []).append(name)
    return kinds


def _between(points: list[tuple[float, float]], at: float) -> float:
    points = sorted(points)
    before = max((point for point in points if point[0] <= at), default=points[0])
    behind = min((point for point in points if point[0] >= at), default=points[-1])
    if behind[0] <= before[0]:
        return before[1]
    part = (at - before[0]) / (behind[0] - before[0])
    return before[1] + part * (behind[1] - before[1])
