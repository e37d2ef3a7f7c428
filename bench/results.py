"""The results file: one row for each case and contestant, replaced case by case."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import torch

from bench import lineup
from bench.cases import CALLS, Case, all_cases, group_of
from peftkernels._files import write_text
from peftkernels.cli.machine import machine, versions
from peftkernels.cli.timing import Samples, spread

# The device of every result that was not measured on a GPU.
CPU = "cpu"


class ResultsError(Exception):
    """A results file that cannot be used; the message names it and says what was found."""


@dataclass(frozen=True)
class Row:
    """Times are microseconds a call; ratios are of the same round, below 1 when faster; None where a figure cannot be.

    Attributes:
        ratio: this contestant over the frozen layer or model.
        ours_ratio: peftkernels over this contestant.
        roofline_percent: the least time that operations and bytes need at this machine's measured peaks, over
            median_us.
        saved_bytes: kept for the backward pass beside the parameters.
        disturbed: most rounds were disturbed by other processes: not to be relied on.
        device: what it ran on: "cpu", or the name of a GPU; processor and threads are the host's.

    Columns with a default may be missing in a file: it was written before they were there.
    """

    id: str
    group: str
    operator: str
    direction: str
    K: int
    N: int
    M: int
    r: int
    live: int
    masking: str
    dtype: str
    dropout: float
    bias: bool
    modules: int
    model: str
    contestant: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float | None
    ratio_p25: float | None
    ratio_p75: float | None
    ours_ratio: float
    ours_ratio_p25: float
    ours_ratio_p75: float
    rounds: int
    discarded: int
    disturbed: bool
    roofline_percent: float | None
    saved_bytes: int | None
    threads: int
    processor: str
    torch: str
    peft: str
    python: str
    peftkernels: str
    commit: str
    date: str
    timing: str = CALLS
    device: str = CPU


@dataclass(frozen=True)
class Origin:
    """What all rows of a run have in common."""

    threads: int
    processor: str
    torch: str
    peft: str
    python: str
    peftkernels: str
    commit: str
    date: str
    device: str = CPU


def origin(device: str = CPU) -> Origin:
    """This machine, its versions, the commit and the day; `device` is what runs the cases."""
    facts, found = machine(), versions(["peft"])
    return Origin(
        threads=torch.get_num_threads(),
        processor=f"{facts['processor']}, {facts['cores']} cores",
        torch=torch.__version__,
        peft=found["peft"] or "",
        python=found["python"] or "",
        peftkernels=found["peftkernels"] or "",
        commit=commit(),
        date=date.today().isoformat(),
        device=device,
    )


# What a run and its report write themselves.
WRITTEN = ("bench/results", "docs", "README.md")


def commit() -> str:
    """The commit that is measured, "-dirty" behind it when tracked files differ from it.

    Results and what is generated from them do not count: a run that follows another one measures the same code. Where
    there is no repository, as in a copy on another machine, it is what PEFTKERNELS_COMMIT says, else "unknown".
    """
    return _commit() or os.environ.get("PEFTKERNELS_COMMIT") or "unknown"


def _commit() -> str | None:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        # An installed package may lie inside somebody else's repository.
        if git("ls-files", "--error-unmatch", "results.py") is None:
            return None
        excluded = [f":(top,exclude){path}" for path in WRITTEN]
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *excluded)
        described = git("describe", "--always")
    except OSError:
        return None
    if changes is None or described is None:
        return None
    return f"{described}-dirty" if changes else described


def rows_of(
    case: Case,
    samples: Samples,
    roofline: dict[str, float | None],
    saved: dict[str, int | None],
    common: Origin,
    group: str | None = None,
) -> list[Row]:
    """A measured case as rows, one for each contestant; `group` where the case is not of the CPU's registry."""
    ours = lineup.ours(case)
    found = []
    for name in samples.rounds[0]:
        times = spread(samples.times(name))
        to_frozen = spread(samples.ratios(name, lineup.FROZEN)) if lineup.FROZEN in samples.rounds[0] else None
        ours_to_it = spread(samples.ratios(ours, name))
        percent = roofline.get(name)
        found.append(
            Row(
                id=case.id,
                group=group_of(case) if group is None else group,
                **asdict(case),
                contestant=name,
                median_us=round(1e6 * times.median, 2),
                p20_us=round(1e6 * times.p20, 2),
                p80_us=round(1e6 * times.p80, 2),
                ratio=None if to_frozen is None else round(to_frozen.median, 4),
                ratio_p25=None if to_frozen is None else round(to_frozen.p25, 4),
                ratio_p75=None if to_frozen is None else round(to_frozen.p75, 4),
                ours_ratio=round(ours_to_it.median, 4),
                ours_ratio_p25=round(ours_to_it.p25, 4),
                ours_ratio_p75=round(ours_to_it.p75, 4),
                rounds=len(samples.rounds),
                discarded=samples.discarded,
                disturbed=samples.disturbed,
                roofline_percent=None if percent is None else round(percent, 1),
                saved_bytes=saved.get(name),
                **asdict(common),
            )
        )
    return found


def file_name() -> str:
    """<processor and cores>.csv, with the number of threads where it is not the number of cores."""
    facts = machine()
    name = f"{facts['processor']} {facts['cores']} cores"
    if torch.get_num_threads() != facts["cores"]:
        name += f" {torch.get_num_threads()} threads"
    return f"{slug(name)}.csv"


def slug(name: str) -> str:
    """A machine's name as files bear it: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_DEFAULTS = {field.name for field in fields(Row) if field.default is not MISSING}


def read(path: Path) -> list[Row]:
    """The rows of a results file; raises ResultsError where it has other columns or a value cannot be read."""
    columns = [field.name for field in fields(Row)]
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or ())
            if found not in (columns, [name for name in columns if name not in _DEFAULTS]):
                odd = sorted(set(found) ^ set(columns))
                raise ResultsError(
                    f"{path}: its columns are not those of this version ({', '.join(odd[:4]) or 'another order'}); "
                    "remove it or choose another --out"
                )
            return [_parse(line) for line in reader]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ResultsError(f"{path}: cannot be read as results: {error}") from error


def _parse(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Row).items():
        if name not in line:
            continue
        text = line[name]
        if kind is bool:
            if text not in ("True", "False"):
                raise ValueError(f"{name}: found {text!r}, expected True or False")
            values[name] = text == "True"
        elif kind in (int, float, str):
            values[name] = kind(text)
        else:
            values[name] = None if text == "" else (int if kind == int | None else float)(text)
    return Row(**values)


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, with those of a case that is in `new` replaced; in the registry's order, unknown cases last."""
    measured = {row.id for row in new}
    kept = [row for row in old if row.id not in measured]
    place = {case.id: number for number, case in enumerate(all_cases())}
    return sorted([*kept, *new], key=lambda row: place.get(row.id, len(place)))


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the rows to `path`: all of them, or nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())
