"""What survives a kill: every file is written beside its place, flushed to the disk, and moved there in one step.

arguments.json     what the demo was started with; ``--resume`` refuses others
training.pt        the training in progress
runs/<name>.pt     a finished training: final weights, masks, loss curve, accuracy
runs/<name>/decisions.jsonl
                   what was decided about ranks, where something was
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from peftkernels._files import PARTIAL, write_atomically
from peftkernels.cli.demo.errors import InputError

ARGUMENTS = "arguments.json"
TRAINING = "training.pt"
RUNS = "runs"
RESULTS = "results.json"
DECISIONS = "decisions.jsonl"


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class Store:
    """The output directory of one demo.

    Args:
        directory: created if missing.
        arguments: argument name to JSON value, the ones that decide the bits of the result.
    """

    # The file that says that all is done, and what messages call it all.
    finished_mark = RESULTS
    what = "demo"

    def __init__(self, directory: Path, arguments: dict[str, Any]) -> None:
        self.directory = directory
        self.arguments = arguments

    def open(self, *, resume: bool) -> str | None:
        """Prepare the directory, and return a note for the user if there is something to say.

        With ``resume`` an unfinished demo is continued; without, a finished one is replaced and an unfinished one is
        an error, so that no training is lost by accident.

        Raises:
            InputError: the directory holds something else, an unfinished demo, or a demo with other arguments.
        """
        directory = self.directory
        if directory.exists() and not directory.is_dir():
            raise InputError(f"--out: {directory}: is a file; expected a directory")
        started = (directory / ARGUMENTS).is_file()
        if not started:
            if directory.is_dir() and any(directory.iterdir()):
                raise InputError(f"--out: {directory}: is not empty and was not written by 'peftkernels demo'")
            self._start()
            return f"{directory} holds nothing to resume; starting from the beginning" if resume else None
        if resume:
            self._compare()
            self._remove_leftovers()
            return None
        if not (directory / self.finished_mark).is_file():
            raise InputError(
                f"--out: {directory}: holds an unfinished {self.what}; continue it with --resume, name another "
                "directory, or delete this one"
            )
        self._clear()
        self._start()
        return f"replacing the finished {self.what} in {directory}"

    def _start(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / ARGUMENTS, self.arguments)
        except OSError as error:
            raise InputError(f"--out: {self.directory}: cannot be written: {error.strerror}") from None

    def _compare(self) -> None:
        path = self.directory / ARGUMENTS
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {path}: cannot be read: {error}") from None
        for name in sorted(before.keys() | self.arguments.keys()):
            if before.get(name) != self.arguments.get(name):
                raise InputError(
                    f"--resume: {name} is {self.arguments.get(name)!r}, but the training in {self.directory} was "
                    f"started with {before.get(name)!r}"
                )

    def _remove_leftovers(self) -> None:
        for leftover in self.directory.rglob(f".*{PARTIAL}"):
            leftover.unlink(missing_ok=True)

    def _clear(self) -> None:
        runs = self.directory / RUNS
        logs = runs.glob(f"*/{DECISIONS}")
        for path in [self.directory / RESULTS, self.directory / TRAINING, *runs.glob("*.pt"), *logs]:
            path.unlink(missing_ok=True)
        self._remove_leftovers()

    def decisions(self, name: str) -> Path:
        """Where the training ``name`` logs its decisions."""
        return self.directory / RUNS / name / DECISIONS

    def save_training(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint of the training in progress."""
        write_atomically(self.directory / TRAINING, lambda file: torch.save(state, file))

    def load_training(self) -> dict[str, Any] | None:
        """The checkpoint of the training in progress, None when there is none."""
        return self._load(self.directory / TRAINING)

    def save_finished(self, name: str, record: dict[str, Any]) -> None:
        """Keep a finished training; its checkpoint is no longer needed."""
        write_atomically(self.directory / RUNS / f"{name}.pt", lambda file: torch.save(record, file))
        (self.directory / TRAINING).unlink(missing_ok=True)

    def load_finished(self, name: str) -> dict[str, Any] | None:
        """A finished training, None when it is not finished."""
        return self._load(self.directory / RUNS / f"{name}.pt")

    @staticmethod
    def _load(path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise InputError(f"--resume: {path}: is damaged and cannot be loaded: {error}") from error
        return state
