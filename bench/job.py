"""`python -m bench` from its options to its tables and files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import lineup, plan, results, roofline, runner
from bench.cases import QUICK, Case, select
from bench.options import NAME, Options
from bench.plan import Planned
from bench.replay import replay
from bench.results import ResultsError
from bench.runner import Measured, Store
from bench.table import print_list, print_tables
from bench.verify import WrongResultError
from peftkernels.backends.registry import backend_status

QUICK_SECONDS, QUICK_LIMIT = 1.0, 45.0
LINES_WIDTH = 200


class InputError(Exception):
    """Something the user passed cannot be used."""


def run_bench(options: Options) -> int:
    """Run the benchmark; returns the exit code: 0, 1 for a wrong result, 2 for wrong input, 130 when interrupted."""
    try:
        return _run(options)
    except (InputError, ResultsError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    except WrongResultError as error:
        print(f"{NAME}: wrong result: {error}", file=sys.stderr)
        return 1


def _run(options: Options) -> int:
    cases = _cases(options)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else plan.SECONDS)
    limit = None if options.full else QUICK_LIMIT if options.quick and not options.cases else plan.LIMIT_SECONDS
    extent = _extent(options)
    console = Console() if sys.stdout.isatty() else Console(width=LINES_WIDTH)
    if options.list:
        planned = plan.plan(cases, seconds=seconds, limit=limit, extent=extent)
        print_list(console, cases, [item.seconds for item in planned])
        return 0
    _check_files(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    store = Store(options.out / results.file_name())
    unavailable = backend_status()["cpu"]
    if unavailable is not None:
        print(f"peftkernels runs on its PyTorch backend here: {unavailable}", file=sys.stderr)
    peaks = roofline.measure_peaks()
    planned = plan.plan(cases, seconds=seconds, limit=limit, extent=extent, peaks=peaks)
    measured: list[Measured] = []

    def done(item: Planned, found: Measured) -> None:
        measured.append(found)
        progress.done(item, found)

    code = 0
    with _Progress(planned) as progress:
        try:
            runner.run(
                planned,
                peaks,
                store,
                limit=limit,
                seconds=seconds,
                extent=extent,
                begin=progress.begin,
                done=done,
            )
        except KeyboardInterrupt:
            code = 130
    if measured:
        print_tables(console, measured, store.rows)
        console.print(f"written: {store.path}", highlight=False, soft_wrap=True)
        if options.json or options.histogram or options.compare:
            replay(measured, json=options.json, histogram=options.histogram, compare=options.compare)
    if code:
        print(f"interrupted; {len(measured)} of {len(planned)} cases are measured and kept", file=sys.stderr)
    return code


def _cases(options: Options) -> list[Case]:
    if options.quick and not options.cases:
        return list(dict.fromkeys(QUICK))
    try:
        return select(options.cases)
    except ValueError as error:
        raise InputError(f"CASE: {error}") from None


def _extent(options: Options) -> lineup.Extent:
    """Who takes part: nobody is compiled in a quick run, or without a C++ compiler."""
    extent = lineup.FULL if options.full else lineup.BRIEF if options.quick else lineup.USUAL
    if extent.compiled == lineup.NOWHERE:
        return extent
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, and what looking for one on other systems raises
        print(f"no C++ compiler for torch.compile ({error}): peft compiled is left out", file=sys.stderr)
        return replace(extent, compiled=lineup.NOWHERE)
    return extent


def _check_files(options: Options) -> None:
    """Everything that is read or written can be, before hours are spent."""
    if options.compare is not None and not options.compare.is_file():
        raise InputError(f"--compare: {options.compare}: no such file; expected what --json of an earlier run wrote")
    if options.compare is not None:
        _check_comparable(options.compare)
    for name, path in (("--out", options.out), ("--json", options.json), ("--histogram", options.histogram)):
        if path is None:
            continue
        folder = path if name == "--out" else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{name}: {folder}: cannot be made a folder: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise InputError(f"{name}: {folder}: found a folder that cannot be written to")
        if name == "--json" and path.is_dir():
            raise InputError(f"--json: {path}: found a folder, expected the name of a file")


def _check_comparable(path: Path) -> None:
    import json

    try:
        found = json.loads(path.read_text())
        names = [entry["fullname"] for entry in found["benchmarks"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise InputError(f"--compare: {path}: found no pytest-benchmark results, expected what --json wrote")


def minutes(seconds: float) -> str:
    """In words: seconds up to a minute and a half, then minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class _Progress:
    """A bar with the time left on a terminal, a line for each case anywhere else; on standard error."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._console = Console(stderr=True)
        self._total = len(planned)
        self._planned = sum(item.seconds for item in planned)
        self._done = 0.0
        self._began = time.monotonic()
        self._number = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[cases]}"),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=self._planned, cases=f"0/{self._total}", left="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        if not self._console.is_terminal:
            self._say(f"{self._total} cases, about {minutes(self._planned)}")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, case: Case) -> None:
        """Say what is being measured."""
        self._bar.update(self._task, description=case.id, left=f"{self._time_left()} left")

    def _time_left(self) -> str:
        """At the pace so far; cases last from a second to minutes, too unequal for a bar to tell by itself."""
        pace = (time.monotonic() - self._began) / self._done if self._done else 1.0
        return minutes(max(0.0, self._planned - self._done) * pace)

    def done(self, item: Planned, found: Measured) -> None:
        """Say what came out, and how long is left."""
        self._number += 1
        self._done += item.seconds
        self._bar.update(self._task, advance=item.seconds, cases=f"{self._number}/{self._total}", left="")
        own = runner.ours_row(found.rows, item.case)
        rounds = f"{own.rounds} rounds" + (f", {own.discarded} discarded" if own.discarded else "")
        ratios = "  ".join(
            f"{row.contestant} {row.ratio:.2f}" if row.ratio is not None else f"{row.contestant} {row.median_us:.0f} µs"
            for row in found.rows
            if row.contestant != lineup.FROZEN
        )
        left = "" if self._console.is_terminal else f"[{self._number}/{self._total}, {self._time_left()} left] "
        self._say(f"{left}{item.case.id}: {ratios}  ({rounds}{', DISTURBED' if own.disturbed else ''})")
