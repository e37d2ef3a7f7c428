"""The logs of a run directory, and what the demo wrote beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkernels._reading import check_number, check_object, read_json, shown
from peftkernels.allocation.logs.run_log import RunLog, read_log

ARGUMENTS = "arguments.json"
RESULTS = "results.json"
RUNS = "runs"
DECISIONS = "decisions.jsonl"


class ReportError(Exception):
    """A run directory that no report can be made of; the message says why."""


@dataclass(frozen=True)
class Collected:
    """What was found.

    Attributes:
        logs: by name of the run; the log of the directory itself is named after the directory.
        arguments: what the demo was started with, empty where it did not say.
        results: the demo's results.json, empty where there is none (yet).
    """

    directory: Path
    logs: Mapping[str, RunLog]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)

    def outcome(self, run: str) -> dict[str, Any]:
        """The demo's figures of a run, empty where it has none."""
        return dict(self.results.get("runs", {}).get(run, {}))

    def losses(self, run: str) -> tuple[Sequence[int], Sequence[float]]:
        """Steps and losses by the demo's results."""
        losses = enumerate(self.outcome(run).get("losses", []), start=1)
        finite = [(step, loss) for step, loss in losses if loss is not None]
        return [step for step, _ in finite], [loss for _, loss in finite]


def collect(directory: Path) -> Collected:
    """Read DIRECTORY/decisions.jsonl, DIRECTORY/runs/*/decisions.jsonl, and the demo's results and arguments.

    Raises:
        ReportError: no log, or a file that cannot be read or is not what it should be, which is named.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory}: no such directory")
    runs = {path.parent.name: path for path in sorted((directory / RUNS).glob(f"*/{DECISIONS}"))}
    own = directory.resolve().name
    paths = {f"{own}/" if own in runs else own: directory / DECISIONS, **runs}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        raise ReportError(
            f"{directory}: found neither {DECISIONS} nor {RUNS}/*/{DECISIONS}, expected the log of a run with an "
            "adaptive rank budget"
        )
    logs = {}
    for name, path in paths.items():
        try:
            logs[name] = read_log(path)
        except OSError as error:
            raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ReportError(str(error)) from None
    results = _read(directory / RESULTS)
    _check_results(directory / RESULTS, results)
    return Collected(directory, logs, _read(directory / ARGUMENTS), results)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return check_object(read_json(path), str(path))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(str(error)) from None


def _check_results(path: Path, results: dict[str, Any]) -> None:
    """What the page shows of the demo's figures is what it takes it for."""
    try:
        for name, outcome in check_object(results.get("runs", {}), f"{path}: runs").items():
            where = f"{path}: runs[{name!r}]"
            check_object(outcome, where)
            for figure in ("accuracy", "milliseconds"):
                if outcome.get(figure) is not None:
                    check_number(outcome[figure], f"{where}.{figure}")
            losses = outcome.get("losses", [])
            if not isinstance(losses, list):
                raise ValueError(f"{where}.losses: found {shown(losses)}, expected a list of numbers")
            for index, loss in enumerate(losses):
                # null stands for a number that JSON lacks.
                if loss is not None:
                    check_number(loss, f"{where}.losses[{index}]")
    except ValueError as error:
        raise ReportError(str(error)) from None
