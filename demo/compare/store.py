"""What a comparison keeps: one small file for each training, so that one that was killed goes on where it was.

- `arguments.json`: what decides the bits of every training; ``--resume`` refuses others
- `runs/<trial>.json`: a finished training
- `timing.json`: step times of all contestants
- `comparison.json`: the outcome
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.checkpoint import Store, read_record, write_json
from demo.compare.contestants import Earlier
from demo.compare.settings import Setting, Trial
from demo.errors import InputError
from peftkernels._reading import check_number, check_object, check_whole, shown
from peftkernels.cli.report.collect import RUNS

COMPARISON = "comparison.json"
TIMING = "timing.json"


class ComparisonStore(Store):
    """The output directory of one comparison. A finished one may be resumed with more strategies or seeds."""

    finished_mark = COMPARISON
    what = "comparison"

    def path(self, trial: Trial) -> Path:
        """Where the outcome of ``trial`` is kept."""
        return self.directory / RUNS / f"{trial.key}.json"

    def load(self, trial: Trial) -> dict[str, Any] | None:
        """The outcome of a training, None when it is not finished."""
        path = self.path(trial)
        found = self._read(path)
        if found is None:
            return None
        if found.get("trial") != json.loads(json.dumps(trial.as_dict())):
            raise InputError(f"--resume: {path}: holds the training {shown(found.get('trial'))}")
        _check(_check_outcome, found, path)
        return found

    def finished(self, trial: Trial) -> dict[str, Any]:
        """The outcome of a training that is finished.

        Raises:
            RuntimeError: it is not.
        """
        found = self.load(trial)
        if found is None:
            raise RuntimeError(f"{self.path(trial)}: not found, expected a finished training")
        return found

    def earlier(self, setting: Setting) -> Earlier:
        """What a training with this setting starts from.

        Raises:
            RuntimeError: the training that it takes the ranks of is not finished.
        """
        if setting.prior is None:
            return Earlier(candidate=setting.candidate)
        path = self.directory / RUNS / f"{setting.prior}.json"
        found = self._read(path)
        if found is None:
            raise RuntimeError(f"{setting.prior}: not found in {self.directory / RUNS}, expected a finished training")
        _check(_check_outcome, found, path)
        return Earlier(found["live_ranks_by_module"], setting.candidate)

    def load_timing(self) -> dict[str, Any] | None:
        """Step times, None when they were not measured."""
        found = self._read(self.directory / TIMING)
        if found is not None:
            _check(_check_timing, found, self.directory / TIMING)
        return found

    def save_timing(self, timing: dict[str, Any]) -> None:
        """Keep step times."""
        write_json(self.directory / TIMING, timing)

    def _clear(self) -> None:
        for path in [self.directory / COMPARISON, self.directory / TIMING, *(self.directory / RUNS).glob("*.json")]:
            path.unlink(missing_ok=True)
        self._remove_leftovers()

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            return read_record(path)
        except FileNotFoundError:
            return None


def _check(check: Callable[[dict[str, Any]], None], found: dict[str, Any], path: Path) -> None:
    try:
        check(found)
    except ValueError as error:
        raise InputError(f"--resume: {path}: is damaged and cannot be loaded: {error}") from None


def _check_outcome(found: dict[str, Any]) -> None:
    """Every field that the comparison reads of a training."""
    for name in ("accuracy", "training_processor_seconds", "evaluation_processor_seconds"):
        check_number(found.get(name), name)
    for name in ("labels", "live_ranks", "total_ranks", "live_parameters", "trainable_parameters"):
        check_whole(found.get(name), name)
    losses = found.get("losses")
    if not isinstance(losses, list) or not losses:
        raise ValueError(f"losses: found {shown(losses)}, expected a list of numbers")
    for place, loss in enumerate(losses):
        check_number(loss, f"losses[{place}]")
    for name, ranks in check_object(found.get("live_ranks_by_module"), "live_ranks_by_module").items():
        check_whole(ranks, f"live_ranks_by_module[{name!r}]")
    if not isinstance(found.get("frozen_modules", []), list):
        raise ValueError(f"frozen_modules: found {shown(found['frozen_modules'])}, expected a list of names")


def _check_timing(found: dict[str, Any]) -> None:
    check_object(found.get("settings"), "settings")
    for name in ("rounds", "discarded", "threads"):
        check_whole(found.get(name), name)
    check_number(found.get("tokens_per_step"), "tokens_per_step")
    for contestant, times in check_object(found.get("contestants"), "contestants").items():
        for name, value in check_object(times, f"contestants[{contestant!r}]").items():
            if value is not None:
                check_number(value, f"contestants[{contestant!r}].{name}")
