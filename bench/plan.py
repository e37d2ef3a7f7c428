"""How long each case may be measured, so that all of them end in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import data, lineup
from bench.cases import ALLOCATOR, ORTHOGONALITY, STRATEGIES, TRAINING, Case
from bench.roofline import ASSUMED, Peaks, work
from peftkernels.cli.timing import FEWEST_ROUNDS, TURN_SECONDS, WINDOW_SECONDS, Effort

SECONDS, ROUNDS = 1.2, 5
# Thirty minutes less what starting up, measuring the peaks and slower moments of the machine may take.
LIMIT_SECONDS = 27 * 60.0

COMPILE_SECONDS = 25.0
# Seconds for an element of a result, converted to float64 and compared.
_COMPARED = 40e-9
# Random numbers drawn a second, casts included.
_DRAWN = 60e6
# Time of a call's products over the frozen layer's, as it was seen, rounded up.
_RELATIVE = {
    lineup.FROZEN: 1.0,
    lineup.OURS: 1.05,
    lineup.HALF_RANK: 1.05,
    lineup.NO_DROPOUT: 1.05,
    lineup.FLOOR: 1.15,
    lineup.EAGER: 1.25,
    lineup.COMPILED: 1.25,
    lineup.PEFT_LORA: 1.25,
    lineup.PEFT_ADALORA: 1.3,
    lineup.PEFT_LORA_BF16: 1.25,
    lineup.PEFT_ADALORA_BF16: 1.3,
    lineup.PEFT_LORA_FP32: 1.5,
    lineup.PEFT_ADALORA_FP32: 1.6,
}
# What a call costs beside its products, in seconds: what decides where there are few rows.
_CALL = {lineup.FROZEN: 8e-6, lineup.FLOOR: 60e-6, lineup.OURS: 25e-6}
_PEER_CALL = 60e-6
# One step of the whole models by each contestant together, and building them, as seen on two cores.
_TRAINING_ROUND = {"minilm": 1.7e-3, "llama": 4.0e-3}
_TRAINING_SETUP_ROUNDS, _TRAINING_SETUP_SECONDS = 9, 6.0
_ALLOCATOR_STEP = {"": 120e-6, ORTHOGONALITY: 400e-6}
# Share of the seconds that were asked for, and rounds, from what is wanted down to what must do.
_ATTEMPTS = ((1.0, ROUNDS), (0.75, ROUNDS), (0.5, ROUNDS), (0.5, 4), (0.5, FEWEST_ROUNDS), (0.15, FEWEST_ROUNDS))


@dataclass(frozen=True)
class Estimate:
    """Seconds before the first round, and of one round."""

    setup: float
    round: float

    def total(self, effort: Effort) -> float:
        """Seconds of the case when nothing disturbs it."""
        rounds = max(self.round * effort.rounds, effort.seconds, WINDOW_SECONDS)
        return self.setup + 2 * self.round + rounds + 0.5 * self.round


def estimate(case: Case, extent: lineup.Extent = lineup.USUAL, peaks: Peaks = ASSUMED) -> Estimate:
    """What measuring the case will take."""
    if case.operator == ALLOCATOR:
        return Estimate(0.02 * case.modules, 2 * max(TURN_SECONDS, 3 * _ALLOCATOR_STEP[case.direction] * case.modules))
    if case.operator == STRATEGIES:
        count = len(lineup.contestants(case))
        return Estimate(0.02 * case.modules, count * max(TURN_SECONDS, 2 * _ALLOCATOR_STEP[""] * case.modules))
    if case.operator == TRAINING:
        once = _TRAINING_ROUND[case.model] * case.M
        return Estimate(_TRAINING_SETUP_SECONDS + _TRAINING_SETUP_ROUNDS * once, once)
    dtype = data.dtypes(case)[0]
    m, n, k = case.M, case.N, case.K
    frozen = 1.1 * work(case, lineup.FROZEN).seconds(dtype, peaks)
    repeats = max(1.0, TURN_SECONDS / (frozen + _CALL[lineup.FROZEN]))
    names = lineup.contestants(case, extent)
    low_rank = 1 + 4 * case.live_ranks * (k + n) / (n * k)
    once = sum(
        _RELATIVE[name] * frozen * (low_rank if name != lineup.FROZEN else 1) + _CALL.get(name, _PEER_CALL)
        for name in names
    )
    # Verified are y in float64 and in plain PyTorch, and three such products for the gradients.
    products = 2 * m * n * k * (4 if case.trains else 1)
    verifying = products * (3 / peaks.flops[torch.float32] + 2 / peaks.flops[dtype]) + _COMPARED * m * max(n, k)
    drawing = (2 * m * max(n, k) + n * k) / _DRAWN
    compiling = COMPILE_SECONDS if lineup.COMPILED in names else 0.0
    return Estimate(drawing + verifying + compiling, repeats * once)


@dataclass(frozen=True)
class Planned:
    """A case, how long it is measured, and how long all of it is expected to take."""

    case: Case
    effort: Effort
    seconds: float


def plan(
    cases: Sequence[Case],
    *,
    seconds: float = SECONDS,
    limit: float | None = LIMIT_SECONDS,
    extent: lineup.Extent = lineup.USUAL,
    peaks: Peaks = ASSUMED,
) -> list[Planned]:
    """Efforts for `cases` that end within `limit` seconds by their estimates.

    Each case gets `seconds` and ROUNDS rounds; where that takes too long, less time, and then fewer rounds.
    """
    estimates = []
    compiled: set[tuple[object, ...]] = set()
    for case in cases:
        found = estimate(case, extent, peaks)
        if lineup.compiles(case, extent):
            # Compiled once for each number of rows of a layer.
            key = (case.direction, case.K, case.N, case.r, case.dtype, case.dropout, case.bias)
            found = Estimate(found.setup - (COMPILE_SECONDS if key in compiled else 0), found.round)
            compiled.add(key)
        estimates.append(found)
    for share, rounds in _ATTEMPTS:
        each = share * seconds
        efforts = [effort(estimated, each, rounds) for estimated in estimates]
        totals = [estimated.total(how) for estimated, how in zip(estimates, efforts, strict=True)]
        if limit is None or sum(totals) <= limit:
            break
    return [Planned(*parts) for parts in zip(cases, efforts, totals, strict=True)]


def effort(estimated: Estimate, seconds: float, rounds: int) -> Effort:
    """Three times the expected time at the most, for the rounds that other processes disturb."""
    return Effort(seconds, rounds, 3 * max(seconds, rounds * estimated.round, WINDOW_SECONDS))
