"""What is varied: the settings of a training, the grids, and what one training of the comparison is."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from peftkernels.allocation.search import Candidate

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class Setting:
    """What tuning, search and the sensitivity grid vary.

    Attributes:
        learning_rate: of the adapters.
        scale: lora_alpha over the rank at the start: what the low-rank product is multiplied with.
        target_rank: ranks per adapted matrix at the end, on average; of fixed-rank adapters, of each.
        delta_t: steps between two allocations.
        candidate: where a search chose the setting: all that it chose, the schedule and the groups' shares too.
        prior: the key of the training whose final ranks this one starts from.
    """

    learning_rate: float
    scale: float
    target_rank: int
    delta_t: int
    candidate: Candidate | None = None
    prior: str | None = None

    @classmethod
    def of(cls, candidate: Candidate) -> Setting:
        """What a search over budgets chose.

        Raises:
            ValueError: it chose no learning rate.
        """
        if candidate.learning_rate is None:
            raise ValueError("candidate: found no learning rate, expected a space that ranges over it")
        scale = candidate.lora_alpha / candidate.init_r
        return cls(candidate.learning_rate, scale, candidate.target_r, candidate.deltaT, candidate)

    def at(self, *, target_rank: int | None = None, delta_t: int | None = None) -> Setting:
        """The same but for one of both."""
        rank, every = target_rank or self.target_rank, delta_t or self.delta_t
        candidate = self.candidate and replace(self.candidate, target_r=rank, deltaT=every)
        return replace(self, target_rank=rank, delta_t=every, candidate=candidate)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Trial:
    """One training: whose, from which seed, with which setting, and which texts its accuracy is measured on.

    Attributes:
        held_out: TEST: the test texts. VALIDATION: texts taken out of the training texts, never the test texts.
    """

    contestant: str
    seed: int
    setting: Setting
    held_out: str = TEST

    @property
    def key(self) -> str:
        """A name for the file with its outcome."""
        chosen = self.setting
        text = (
            f"{self.contestant}-{self.held_out}-seed{self.seed}-lr{chosen.learning_rate:g}-scale{chosen.scale:g}"
            f"-r{chosen.target_rank}-every{chosen.delta_t}"
        )
        if chosen.candidate is not None:
            # Too much for a name.
            digest = hashlib.sha256(json.dumps(asdict(chosen.candidate), sort_keys=True).encode()).hexdigest()
            text += f"-candidate-{digest[:12]}"
        return text if chosen.prior is None else f"{text}-after-{chosen.prior}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "setting": self.setting.as_dict()}


@dataclass(frozen=True)
class Design:
    """What is compared, decided before anything is trained.

    Attributes:
        initial_rank: ranks per adapted matrix at the start of a falling budget.
        target_rank: ranks that strategies are compared at.
        delta_t: steps between two allocations that they are compared at.
        learning_rates: the grid that every contestant is tuned on: wide enough for plain factors, which start at zero
            and learn at 0.001 to 0.003, and for gated ones, products of three small factors, which need more.
        scales: the same of scales.
        tuning_seeds: not used by the comparison itself.
        search_trials: how many settings each search tries: two generations of NSGA-II's.
        search_batch: how many of them it chooses at a time, so that the number of jobs does not change what it chooses.
        target_ranks: sensitivity: varied while `delta_t` stays.
        delta_ts: sensitivity: varied while `target_rank` stays.
        sensitivity_seeds: how many of the comparison's seeds it uses, from the first on.
        loss_level: convergence: this share of ln(labels), what guessing costs.
        orthogonality_weight: of every contestant with gates.
    """

    initial_rank: int = 6
    target_rank: int = 2
    delta_t: int = 1
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    scales: tuple[float, ...] = (2.0, 8.0)
    tuning_seeds: tuple[int, ...] = (1000,)
    search_trials: int = 24
    search_batch: int = 4
    target_ranks: tuple[int, ...] = (1, 2, 4)
    delta_ts: tuple[int, ...] = (1, 5)
    sensitivity_seeds: int = 1
    loss_level: float = 0.5
    orthogonality_weight: float = 0.1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def tuning_grid(self, prior: str | None = None) -> Iterator[Setting]:
        """The settings that every contestant without a search of its own is tried at."""
        for learning_rate, scale in itertools.product(self.learning_rates, self.scales):
            yield Setting(learning_rate, scale, self.target_rank, self.delta_t, prior=prior)

    def sensitivity_grid(self, chosen: Setting, *, adaptive: bool) -> Iterator[Setting]:
        """``chosen`` and the settings that differ from it in one of both; fixed ranks know no delta_t."""
        for target_rank in self.target_ranks:
            yield chosen.at(target_rank=target_rank)
        for delta_t in self.delta_ts if adaptive else ():
            if delta_t != chosen.delta_t:
                yield chosen.at(delta_t=delta_t)


FULL = Design()
QUICK = Design(
    learning_rates=(3e-3,), scales=(2.0, 8.0), target_ranks=(1, 2), delta_ts=(1, 3), search_trials=4, search_batch=2
)
