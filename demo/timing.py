"""Step times that can be compared: all runs take turns on the same batches.

Every variant is built anew from its state halfway through the training, so nothing here touches the trained weights and
AdaLoRA is timed while its budget falls: scores and masks are computed in every step, its dearest phase.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from demo.batches import Batch
from demo.model import TextClassifier, share_frozen
from demo.runs import Run
from peftkernels.cli.timing import Effort, Samples, interleave, spread

FROZEN = "frozen"


@dataclass(frozen=True)
class StepTime:
    """One variant's median milliseconds, and its ratio to the frozen step of the same round: median and quartiles."""

    milliseconds: float
    ratio: float
    ratio_p25: float
    ratio_p75: float


@dataclass(frozen=True)
class Timing:
    """Step times of the demo's or a comparison's variants.

    Attributes:
        steps: by variant.
        rounds: how many count.
        discarded: how many were left out because other processes disturbed them.
        disturbed: too few rounds were undisturbed, so that all of them count.
        measured: the system tells what other processes used.
        samples: milliseconds of each counted round, by variant.
        tokens: average size of the batches, padding included.
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
    """Time one step of every variant in each round, on ``batches`` in turn.

    Args:
        variants: by name; ``FROZEN`` must be one of them.
        batches: each round takes the next.
        wanted_rounds: stop after so many undisturbed rounds,
        most_rounds: or after so many rounds,
        most_seconds: or after so many seconds.
        advance: called with the number of undisturbed rounds so far.
    """
    samples = interleave(
        _Steps(variants, batches),
        Effort(0.0, wanted_rounds, most_seconds, most_rounds),
        repeats=1,
        advance=lambda quiet: advance(min(quiet, wanted_rounds)),
    )
    return Timing(
        steps={name: _step_time(samples, name) for name in variants},
        rounds=len(samples.rounds),
        discarded=samples.discarded,
        disturbed=samples.all_counted,
        measured=samples.watched,
        samples={name: [1e3 * seconds for seconds in samples.times(name)] for name in variants},
        tokens=statistics.fmean(batch.tokens for batch in batches),
    )


@dataclass(frozen=True)
class _Steps:
    """The variants as contestants."""

    contestants: Mapping[str, FrozenStep | TimedRun]
    batches: Sequence[Batch]
    baseline: str = FROZEN

    def prepare(self, name: str) -> None:
        variant = self.contestants[name]
        if isinstance(variant, TimedRun):
            variant.rewind()

    def turn(self, name: str, first: int, repeats: int) -> None:
        for number in range(first, first + repeats):
            self.contestants[name].step(self.batches[number % len(self.batches)])


def _step_time(samples: Samples, name: str) -> StepTime:
    ratio = spread(samples.ratios(name, FROZEN))
    return StepTime(1e3 * statistics.median(samples.times(name)), ratio.median, ratio.p25, ratio.p75)
