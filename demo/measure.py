"""One row of the table for every run: accuracy, step time, ranks, parameters, memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from demo.batches import Batch, collate
from demo.builders import build
from demo.prepare import Prepared
from demo.report import RunFigures
from demo.runs import Run
from demo.saved import bytes_saved_for_backward
from demo.timing import FROZEN, FrozenStep, TimedRun, Timing, time_steps
from demo.train import Record

TIMED_BATCHES = 6
ROUNDS, QUICK_ROUNDS = 12, 5
SECONDS_PER_ROUND = 4.0


def measure(
    prepared: Prepared, records: dict[str, Record], wanted_rounds: int, advance: Callable[[int], None]
) -> tuple[Timing, list[RunFigures]]:
    """Time the runs from halfway through their trainings and collect their figures, the frozen model's first.

    Args:
        advance: called with the number of undisturbed timing rounds so far.
    """
    start = prepared.start
    frozen = FrozenStep(start.base)
    # One step less than where the budget reaches its target: the allocator computes scores up to there.
    last_step = start.recipe.steps - start.recipe.tfinal - 1
    timed = {}
    for name, record in records.items():
        assert record.halfway is not None
        timed[name] = TimedRun(build(name, start), record.halfway, last_step)
    batches, longest = typical_and_longest_batches(prepared)
    saved = {FROZEN: bytes_saved_for_backward(lambda: frozen.loss(longest), _own(frozen.model))}
    for name, variant in timed.items():
        saved[name] = _saved_by(variant.run, longest)
    timing = time_steps(
        {FROZEN: frozen, **timed},
        batches,
        wanted_rounds=wanted_rounds,
        most_rounds=2 * wanted_rounds,
        most_seconds=SECONDS_PER_ROUND * wanted_rounds,
        advance=advance,
    )
    rows = [_row(FROZEN, timing, None, 0, saved[FROZEN])]
    for name, record in records.items():
        rows.append(_row(name, timing, record, timed[name].run.trainable_parameters(), saved[name]))
    return timing, rows


def _own(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _saved_by(run: Run, batch: Batch) -> int:
    return bytes_saved_for_backward(lambda: run.forward(batch)[1], _own(run.model))


def typical_and_longest_batches(prepared: Prepared) -> tuple[list[Batch], Batch]:
    """The training batches whose size is nearest to the average, to be timed, and the largest, for the peak memory.

    A step's time grows about linearly with its tokens, so the ratio of two variants' times on a batch of average
    size is the ratio of their times over the whole training. The median over batches of all sizes would not be.
    """
    sizes = [len(order) * max(len(prepared.training.ids[i]) for i in order) for order in prepared.order]
    average = sum(sizes) / len(sizes)
    nearest = sorted(range(len(sizes)), key=lambda step: abs(sizes[step] - average))[:TIMED_BATCHES]
    typical = [collate(prepared.training, prepared.order[step]) for step in nearest]
    return typical, collate(prepared.training, prepared.order[sizes.index(max(sizes))])


def _row(name: str, timing: Timing, record: Record | None, trainable: int, saved: int) -> RunFigures:
    step = timing.steps[name]
    masks = list(record.masks.values()) if record is not None else []
    return RunFigures(
        name=name,
        accuracy=record.accuracy if record is not None else None,
        milliseconds=step.milliseconds,
        ratio=step.ratio,
        ratio_p25=step.ratio_p25,
        ratio_p75=step.ratio_p75,
        live_ranks=sum(sum(mask) for mask in masks) if masks else None,
        total_ranks=sum(len(mask) for mask in masks) if masks else None,
        trainable_parameters=trainable,
        saved_bytes=saved,
    )
