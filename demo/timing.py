"""Step times that can be compared: all runs take turns on the same batches, and only ratios within a round are kept.

Every variant is built anew from its state halfway through the training, so nothing here touches the trained weights and
AdaLoRA is timed while its budget falls: scores and masks are computed in every step, its dearest phase.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from demo.batches import Batch
from demo.model import TextClassifier, share_frozen
from demo.runs import Run
from peftkernels.cli.load import ForeignLoad

FROZEN = "frozen"
MOST_FOREIGN_SHARE = 0.06


@dataclass(frozen=True)
class StepTime:
    """One variant's median milliseconds, and its ratio to the frozen step of the same round: median and quartiles."""

    milliseconds: float
    ratio: float
    ratio_p25: float
    ratio_p75: float


@dataclass(frozen=True)
class Timing:
    """Step times by variant, ``rounds`` that count, ``discarded`` ones, and the milliseconds of each counted round.

    disturbed  True when too few rounds were undisturbed and all of them were counted
    measured   False where the system does not tell what other processes used
    tokens     average size of the batches, padding included
    """

    steps: dict[str, StepTime]
    rounds: int
    discarded: int
    disturbed: bool
    measured: bool
    samples: dict[str, list[float]]
    tokens: float


class FrozenStep:
    """Forward, loss and backward of the starting model with every parameter frozen.

    The embeddings' output requires grad, so that the backward pass runs through the whole encoder; nothing is updated.
    """

    def __init__(self, base: TextClassifier) -> None:
        model = share_frozen(base)
        assert isinstance(model, TextClassifier)
        self.model = model.requires_grad_(False).train()
        embeddings: nn.Module = model.encoder.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def loss(self, batch: Batch) -> Tensor:
        """What ``step`` differentiates."""
        loss: Tensor = self.model(**batch.inputs()).loss
        return loss

    def step(self, batch: Batch) -> None:
        """One forward and backward pass."""
        self.loss(batch).backward()


class TimedRun:
    """A run that repeats the steps from ``state`` on, going back to it before the budget has reached its target."""

    def __init__(self, run: Run, state: dict[str, Any], last_step: int) -> None:
        self.run = run
        self._state = state
        self._last_step = max(last_step, state["steps_done"] + 1)
        self.run.load_state_dict(copy.deepcopy(state))

    def rewind(self) -> None:
        """Return to the state when the next step would leave the phase that is timed; not part of a step's time."""
        if self.run.steps_done >= self._last_step:
            self.run.load_state_dict(copy.deepcopy(self._state))

    def step(self, batch: Batch) -> None:
        """One whole training step."""
        self.run.step(batch)


def time_steps(
    variants: dict[str, FrozenStep | TimedRun],
    batches: Sequence[Batch],
    *,
    wanted_rounds: int,
    most_rounds: int,
    most_seconds: float,
    advance: Callable[[int], None],
) -> Timing:
    """Time one step of every variant in each round, in an order that rotates, on ``batches`` in turn.

    Args:
        variants: by name; ``FROZEN`` must be one of them.
        wanted_rounds: stop after so many undisturbed rounds,
        most_rounds, most_seconds: or after so many rounds or seconds.
        advance: called with the number of undisturbed rounds so far.
    """
    names = list(variants)
    started = time.perf_counter()
    _round(variants, names, batches[0])
    rounds: list[tuple[dict[str, float], float | None]] = []
    quiet = 0
    while quiet < wanted_rounds and len(rounds) < most_rounds:
        if len(rounds) >= 3 and time.perf_counter() - started > most_seconds:
            break
        turn = len(rounds) % len(names)
        order = names[turn:] + names[:turn]
        with ForeignLoad() as load:
            sample = _round(variants, order, batches[len(rounds) % len(batches)])
        rounds.append((sample, load.share))
        quiet += load.share is None or load.share <= MOST_FOREIGN_SHARE
        advance(quiet)
    tokens = statistics.fmean(batch.tokens for batch in batches)
    return _summary(names, rounds, tokens, least=min(3, wanted_rounds))


def _round(variants: dict[str, FrozenStep | TimedRun], order: Sequence[str], batch: Batch) -> dict[str, float]:
    sample = {}
    for name in order:
        variant = variants[name]
        if isinstance(variant, TimedRun):
            variant.rewind()
        begin = time.perf_counter()
        variant.step(batch)
        sample[name] = 1e3 * (time.perf_counter() - begin)
    return sample


def _summary(
    names: Sequence[str], rounds: Sequence[tuple[dict[str, float], float | None]], tokens: float, least: int
) -> Timing:
    quiet = [sample for sample, share in rounds if share is None or share <= MOST_FOREIGN_SHARE]
    disturbed = len(quiet) < least
    counted = [sample for sample, _ in rounds] if disturbed else quiet
    steps = {}
    for name in names:
        low, middle, high = _quartiles([sample[name] / sample[FROZEN] for sample in counted])
        steps[name] = StepTime(statistics.median(sample[name] for sample in counted), middle, low, high)
    return Timing(
        steps=steps,
        rounds=len(counted),
        discarded=len(rounds) - len(counted),
        disturbed=disturbed,
        measured=all(share is not None for _, share in rounds),
        samples={name: [sample[name] for sample in counted] for name in names},
        tokens=tokens,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
