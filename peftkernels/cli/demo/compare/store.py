"""What a comparison keeps: one small file for each training, so that one that was killed goes on where it was.

arguments.json      what decides the bits of every training; ``--resume`` refuses others
runs/<trial>.json   a finished training
timing.json         step times of all contestants
comparison.json     the outcome
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkernels.cli.demo.checkpoint import RUNS, Store, write_json
from peftkernels.cli.demo.compare.contestants import Earlier
from peftkernels.cli.demo.compare.settings import Setting, Trial
from peftkernels.cli.demo.errors import InputError

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
        found = self._read(self.path(trial))
        if found is not None and found.get("trial") != json.loads(json.dumps(trial.as_dict())):
            raise InputError(f"--resume: {self.path(trial)}: holds the training {found.get('trial')}")
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
        found = self._read(self.directory / RUNS / f"{setting.prior}.json")
        if found is None:
            raise RuntimeError(f"{setting.prior}: not found in {self.directory / RUNS}, expected a finished training")
        return Earlier(found["live_ranks_by_module"], setting.candidate)

    def load_timing(self) -> dict[str, Any] | None:
        """Step times, None when they were not measured."""
        return self._read(self.directory / TIMING)

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
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {path}: is damaged and cannot be loaded: {error}") from error
        return found
