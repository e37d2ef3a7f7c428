"""How long each case may take, so that what matters most is measured before time runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.cases import Case
from bench.gpu.cases import compiles, contestants
from bench.roofline import Peaks
from peftkernels.cli.timing import FEWEST_ROUNDS, Effort

SECONDS, ROUNDS = 0.6, 7
# Turns are long beside the microseconds between a device's first event and its first kernel.
TURN_SECONDS = 6e-3
LEAST_SECONDS = 0.1
# Building and verifying everyone, and compiling peft's layer once, in seconds; corrected by what they took so far.
SETUP_SECONDS, COMPILE_SECONDS = 0.5, 15.0
# Contestants together over as many frozen layers.
_RELATIVE = 1.2


@dataclass
class Budget:
    """Seconds for all cases, None for as long as it takes; `seconds` are what a case gets when there are enough."""

    limit: float | None
    peaks: Peaks
    seconds: float = SECONDS
    clock: Callable[[], float] = time.perf_counter
    _began: float = field(init=False)
    _setups: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.limit is None else self.limit - (self.clock() - self._began)

    def effort(self, cases: Sequence[Case]) -> Effort | None:
        """The effort for the first of `cases`, which are all that are left; None when its time has run out."""
        if self.limit is None:
            return Effort(self.seconds, ROUNDS, 3 * self.seconds)
        share = self.left() * self._expected(cases[0]) / sum(self._expected(case) for case in cases)
        if self.left() < self._setup(cases[0]) + self._rounds(cases[0], FEWEST_ROUNDS):
            return None
        each = min(self.seconds, max(LEAST_SECONDS, share - self._setup(cases[0])))
        rounds = ROUNDS if self._rounds(cases[0], ROUNDS) <= each else FEWEST_ROUNDS
        return Effort(each, rounds, 3 * max(each, self._rounds(cases[0], rounds)))

    def spent(self, case: Case, seconds: float, measuring: float) -> None:
        """A case took `seconds` in all, `measuring` of them in rounds."""
        if not compiles(case):
            self._setups.append(max(0.0, seconds - measuring))

    def _setup(self, case: Case) -> float:
        recent = self._setups[-10:]
        usual = sum(recent) / len(recent) if recent else SETUP_SECONDS
        return usual + (COMPILE_SECONDS if compiles(case) else 0.0)

    def _rounds(self, case: Case, rounds: int) -> float:
        flops = 2.0 * case.M * case.N * case.K * (2 if case.trains else 1)
        turn = max(TURN_SECONDS, _RELATIVE * flops / self.peaks.flops[torch.bfloat16])
        return rounds * turn * len(contestants(case))

    def _expected(self, case: Case) -> float:
        return self._setup(case) + max(self.seconds, self._rounds(case, FEWEST_ROUNDS))
