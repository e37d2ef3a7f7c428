"""Measured cases as pytest-benchmark entries: its JSON, its histograms, its comparison with an earlier run.

pytest-benchmark times one function after the other, and ratios need turns within a round; so a case is measured first,
and each contestant's seconds are then handed to pytest-benchmark through a timer that gives them back.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.runner import Measured

TESTS = Path(__file__).parent / "test_cases.py"
COLUMNS = "min,median,iqr,max,rounds"


@dataclass(frozen=True, eq=False)
class Recorded:
    """A pytest plugin that carries the cases of a run, and their measurements, into test_cases.py."""

    measured: dict[str, Measured]

    @property
    def cases(self) -> list[Case]:
        """The cases to collect."""
        return [item.case for item in self.measured.values()]


class ReplayTimer:
    """A clock for pytest-benchmark: between its readings 2i and 2i + 1, `seconds[i]` pass."""

    def __init__(self) -> None:
        self._now = 0.0
        self._readings: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        """What the coming readings are to show."""
        self._readings = []
        for each in seconds:
            # Each round starts at zero: differences of small numbers lose no digits.
            self._readings += [0.0, each]
        self._readings.reverse()

    def read(self) -> float:
        """The next reading."""
        return self._readings.pop()


def timer_function(timer: ReplayTimer) -> Callable[[], float]:
    """The timer as a function with a name, which pytest-benchmark writes into its files."""

    def replayed() -> float:
        return timer.read()

    return replayed


def extra_info(measured: Measured, contestant: str) -> dict[str, Any]:
    """Ratios and what else a row says, for the entry's `extra_info`."""
    row = next(row for row in measured.rows if row.contestant == contestant)
    names = ("ratio", "ratio_p25", "ratio_p75", "ours_ratio", "ours_ratio_p25", "ours_ratio_p75", "discarded")
    return {name: getattr(row, name) for name in (*names, "disturbed", "roofline_percent", "saved_bytes", "threads")}


def replay(
    measured: Iterable[Measured],
    *,
    json: Path | None = None,
    histogram: Path | None = None,
    compare: Path | None = None,
) -> None:
    """Run test_cases.py on what was measured.

    Args:
        json: file that pytest-benchmark writes.
        histogram: prefix of the SVG files it draws, one for each case.
        compare: JSON of an earlier run; the table of both is printed.

    Raises:
        RuntimeError: that failed; with pytest's output.
    """
    import pytest

    arguments = [
        str(TESTS),
        f"--rootdir={TESTS.parent}",
        f"--config-file={os.devnull}",
        "--quiet",
        "--no-header",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        "--benchmark-enable",
        "--benchmark-group-by=group",
        "--benchmark-sort=name",
        f"--benchmark-columns={COLUMNS}",
        # A folder that exists: it would make `.benchmarks` where it is started otherwise.
        f"--benchmark-storage={tempfile.gettempdir()}",
    ]
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        beside = json.with_name(json.name + ".partial")
        arguments.append(f"--benchmark-json={beside}")
    if histogram is not None:
        histogram.parent.mkdir(parents=True, exist_ok=True)
        arguments.append(f"--benchmark-histogram={histogram}")
    if compare is not None:
        arguments.append(f"--benchmark-compare={compare.resolve()}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(arguments, plugins=[Recorded({item.case.id: item for item in measured})])
    if code != 0:
        raise RuntimeError(f"pytest-benchmark failed with exit code {int(code)}:\n{output.getvalue()}")
    if json is not None:
        os.replace(beside, json)
    if compare is not None:
        sys.stdout.write(output.getvalue())
