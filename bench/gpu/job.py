"""The run: case after case verified and timed, kept as it goes, with tables and goals at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import results, roofline
from bench.cases import ALLOCATOR, CALLS, ENQUEUE, GRAPH, Case
from bench.gpu.budget import TURN_SECONDS, Budget
from bench.gpu.cases import contestants
from bench.gpu.device import Device, answers
from bench.gpu.layer import DeviceLayer
from bench.gpu.verify import verify
from bench.results import Origin, Row
from bench.runner import Measured
from bench.verify import WrongResultError
from peftkernels.backends import registry
from peftkernels.cli.timing import Effort, Samples, interleave, spread

# Calls of a turn where the host is timed: few enough for a device's queue to take them all without waiting.
ENQUEUED_CALLS = 32


@dataclass
class Found:
    """What a run found.

    Attributes:
        failed: ids of cases whose results were wrong, or whose code broke, with the reason.
        left_out: what was not measured, with the reason.
        served: by id, which implementation computed ours and which way its products went.
    """

    measured: list[Measured] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of measuring."""
        return [row for item in self.measured for row in item.rows]


@dataclass(frozen=True)
class Lineup:
    """Who can take part here, and which implementation is ours."""

    peft: bool = True
    compiled: bool = True
    impl: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """A measured case, how ours was served, and which peers could not take part, with the reason."""

    measured: Measured
    served: str
    left_out: dict[str, str]


def measure_case(
    case: Case,
    group: str,
    effort: Effort,
    device: Device,
    peaks: roofline.Peaks,
    common: Origin,
    lineup: Lineup,
    turn_seconds: float = TURN_SECONDS,
) -> Outcome:
    """Verify and time one case."""
    if case.operator == ALLOCATOR:
        return _measure_allocator(case, group, effort, device, common, turn_seconds)
    bench = DeviceLayer(case, device, contestants(case, peft=lineup.peft, compiled=lineup.compiled), lineup.impl)
    verify(bench)
    if case.timing == GRAPH:
        bench.record()
    saved = {name: bench.saved_bytes(name) if case.timing == CALLS else None for name in bench.contestants}
    enqueued = case.timing == ENQUEUE
    samples = interleave(
        bench,
        effort,
        stopwatch=device.enqueued if enqueued else device.elapsed,
        turn_seconds=turn_seconds,
        repeats=ENQUEUED_CALLS if enqueued else None,
    )
    samples = per_call(samples, bench.recorded_calls)
    percent = {}
    if case.timing != ENQUEUE:
        percent = {name: roofline.percent(case, name, spread(samples.times(name)).median, peaks) for name in saved}
    rows = results.rows_of(case, samples, percent, saved, common, group)
    return Outcome(Measured(case, samples, rows), served(bench), bench.left_out)


def _measure_allocator(
    case: Case, group: str, effort: Effort, device: Device, common: Origin, turn_seconds: float
) -> Outcome:
    # HF peft is a contestant, and may not be installed where only layers are measured.
    from bench.allocators import AllocatorBench

    bench = AllocatorBench(case, device.place)
    bench.verify()
    samples = interleave(bench, effort, stopwatch=device.elapsed, turn_seconds=turn_seconds)
    rows = results.rows_of(case, samples, {}, {}, common, group)
    return Outcome(Measured(case, samples, rows), f"allocation: {bench.kernels}", {})


def served(bench: DeviceLayer) -> str:
    """The implementation that computes ours, and where it says so the way that each product goes."""
    if bench.impl != "auto":
        return bench.impl
    found = registry.explain_choice(bench.adapter.call_of(bench.inputs[0], bench.weight, bench.bias))
    directions = ("forward", "backward") if bench.case.trains else ("forward",)
    ways = [f"{direction} {found.routes[direction]}" for direction in directions if direction in found.routes]
    return "; ".join([found.chosen, *ways])


def per_call(samples: Samples, calls: int) -> Samples:
    """Seconds a call of samples that hold `calls` each."""
    rounds = tuple({name: seconds / calls for name, seconds in sample.items()} for sample in samples.rounds)
    return Samples(samples.baseline, rounds, samples.discarded, samples.disturbed)


def run(
    cases: Sequence[tuple[str, Case]],
    device: Device,
    budget: Budget,
    common: Origin,
    lineup: Lineup,
    path: Path,
    *,
    say: Callable[[str], None],
    turn_seconds: float = TURN_SECONDS,
) -> Found:
    """Measure `cases` (group, case) until all are done or time has run out; `path` holds what was measured so far.

    A case that is wrong is not timed, and the others go on. A device that no longer answers ends the run.
    """
    found = Found()
    for number, (group, case) in enumerate(cases):
        left = [each for _, each in cases[number:]]
        effort = budget.effort(left)
        place = f"[{number + 1}/{len(cases)}]"
        if case.operator == ALLOCATOR and not lineup.peft:
            found.left_out[case.id] = "HF peft, beside which allocators are timed, is not there"
            say(f"{place} {case.id}: left out, {found.left_out[case.id]}")
            continue
        if effort is None:
            found.left_out[case.id] = "time ran out"
            say(f"{place} {case.id}: left out, time ran out")
            continue
        began = time.perf_counter()
        try:
            outcome = measure_case(case, group, effort, device, budget.peaks, common, lineup, turn_seconds)
        except torch.OutOfMemoryError as error:
            found.left_out[case.id] = f"out of memory: {error}".splitlines()[0]
            say(f"{place} {case.id}: left out, {found.left_out[case.id]}")
            continue
        except WrongResultError as error:
            found.failed[case.id] = str(error)
            say(f"{place} WRONG: {error}")
            continue
        except Exception as error:
            # Whatever a kernel that does not compile, or breaks, raises: nothing was shown to be right.
            found.failed[case.id] = f"{type(error).__name__}: {error}"
            say(f"{place} FAILED: {case.id}: {found.failed[case.id]}")
            if not answers(device):
                found.failed["device"] = "it no longer answers; the cases after this one were left out"
                say(f"the device: {found.failed['device']}")
                found.left_out.update({each.id: "the device no longer answers" for each in left[1:]})
                break
            continue
        found.measured.append(outcome.measured)
        found.served[case.id] = outcome.served
        for name, reason in outcome.left_out.items():
            found.left_out[f"{case.id}: {name}"] = reason
            say(f"{case.id}: {name} is left out: {reason}")
        results.write(found.rows, path)
        budget.spent(case, time.perf_counter() - began, effort.seconds)
        say(f"{place} {line(outcome.measured)}  [{outcome.served}]")
    return found


def line(item: Measured) -> str:
    """A case in one line, as it is done."""
    ratios = "  ".join(
        f"{row.contestant} {row.median_us:.1f} µs" if row.ratio is None else f"{row.contestant} {row.ratio:.3f}"
        for row in item.rows[1:]
    )
    mark = ", DISTURBED" if item.samples.disturbed else ""
    return f"{item.case.id}: {item.rows[0].median_us:.1f} µs; {ratios}  ({len(item.samples.rounds)} rounds{mark})"
