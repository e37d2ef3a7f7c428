"""What is varied: the settings of a training, the grids, and what one training of the comparison is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class Setting:
    """What tuning and the sensitivity grid vary.

    learning_rate  of the adapters
    scale          lora_alpha over the rank at the start: what the low-rank product is multiplied with
    target_rank    ranks per adapted matrix at the end, on average; of fixed-rank adapters, of each
    delta_t        steps between two allocations
    """

    learning_rate: float
    scale: float
    target_rank: int
    delta_t: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """One training: whose, from which seed, with which setting, and which texts its accuracy is measured on.

    held_out  TEST: the test texts. VALIDATION: texts taken out of the training texts, never the test texts
    """

    contestant: str
    seed: int
    setting: Setting
    held_out: str = TEST

    @property
    def key(self) -> str:
        """A name for the file with its outcome."""
        chosen = self.setting
        return (
            f"{self.contestant}-{self.held_out}-seed{self.seed}-lr{chosen.learning_rate:g}-scale{chosen.scale:g}"
            f"-r{chosen.target_rank}-every{chosen.delta_t}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Design:
    """What is compared, decided before anything is trained.

    initial_rank               ranks per adapted matrix at the start of a falling budget
    target_rank, delta_t       what strategies are compared at
    learning_rates, scales     the grid that every contestant is tuned on: wide enough for plain factors, which start at
                               zero and learn at 0.001 to 0.003, and for gated ones, products of three small factors,
                               which need more
    tuning_seeds               not used by the comparison itself
    target_ranks, delta_ts     sensitivity: each is varied while the other stays
    sensitivity_seeds          how many of the comparison's seeds it uses, from the first on
    loss_level                 convergence: this share of ln(labels), what guessing costs
    orthogonality_weight       of every contestant with gates
    """

    initial_rank: int = 6
    target_rank: int = 2
    delta_t: int = 1
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    scales: tuple[float, ...] = (2.0, 8.0)
    tuning_seeds: tuple[int, ...] = (1000,)
    target_ranks: tuple[int, ...] = (1, 2, 4)
    delta_ts: tuple[int, ...] = (1, 5)
    sensitivity_seeds: int = 1
    loss_level: float = 0.5
    orthogonality_weight: float = 0.1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def tuning_grid(self) -> Iterator[Setting]:
        """The settings that every contestant is tried at."""
        for learning_rate, scale in itertools.product(self.learning_rates, self.scales):
            yield Setting(learning_rate, scale, self.target_rank, self.delta_t)

    def sensitivity_grid(self, chosen: Setting, *, adaptive: bool) -> Iterator[Setting]:
        """``chosen`` and the settings that differ from it in one of both; fixed ranks know no delta_t."""
        for target_rank in self.target_ranks:
            yield replace(chosen, target_rank=target_rank)
        for delta_t in self.delta_ts if adaptive else ():
            if delta_t != chosen.delta_t:
                yield replace(chosen, delta_t=delta_t)


FULL = Design()
QUICK = Design(learning_rates=(3e-3,), scales=(2.0, 8.0), target_ranks=(1, 2), delta_ts=(1, 3), tuning_seeds=(1000,))
