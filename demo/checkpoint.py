"""What survives a kill: every file is written beside its place, flushed to the disk, and moved there in one step.

- `arguments.json`: what the demo was started with; ``--resume`` refuses others
- `training.pt`: the training in progress
- `runs/<name>.pt`: a finished training: final weights, masks, loss curve, accuracy
- `runs/<name>/decisions.jsonl`: what was decided about ranks, where something was
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from demo.errors import InputError
from peftkernels._files import PARTIAL, remove_abandoned, write_atomically
from peftkernels._reading import check_object, read_json
from peftkernels.cli.report.collect import ARGUMENTS, DECISIONS, RESULTS, RUNS

TRAINING = "training.pt"


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def check_out(directory: Path) -> None:
    """Refuse an output directory that is none, or holds what is somebody else's. Quick, so it comes before all work.

    Raises:
        InputError: it, or what it would lie in, is a file; or it is not empty and not a demo's.
    """
    try:
        found = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not found.is_dir():
            raise InputError(f"--out: {found}: is a file; expected a directory")
        if found is directory and not (directory / ARGUMENTS).is_file() and any(directory.iterdir()):
            raise InputError(f"--out: {directory}: is not empty and was not written by 'python -m demo'")
    except OSError as error:
        raise InputError(f"--out: {directory}: cannot be used: {error.strerror}") from None


def read_record(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote.

    Raises:
        InputError: it cannot be read, or is no JSON object.
        FileNotFoundError: it is not there.
    """
    try:
        return check_object(read_json(path), str(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {path}: is damaged and cannot be loaded: {error}") from error


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
        check_out(directory)
        started = (directory / ARGUMENTS).is_file()
        if not started:
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
        before = read_record(self.directory / ARGUMENTS)
        for name in sorted(before.keys() | self.arguments.keys()):
            if before.get(name) != self.arguments.get(name):
                raise InputError(
                    f"--resume: {name} is {self.arguments.get(name)!r}, but the training in {self.directory} was "
                    f"started with {before.get(name)!r}"
                )

    def _remove_leftovers(self) -> None:
        for folder in {leftover.parent for leftover in self.directory.rglob(f".*{PARTIAL}")}:
            remove_abandoned(folder)

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
        write_atomically(self.training_path, lambda file: torch.save(state, file))

    def load_training(self) -> dict[str, Any] | None:
        """The checkpoint of the training in progress, None when there is none."""
        return self._load(self.training_path)

    def save_finished(self, name: str, record: dict[str, Any]) -> None:
        """Keep a finished training; its checkpoint is no longer needed."""
        write_atomically(self.finished_path(name), lambda file: torch.save(record, file))
        (self.directory / TRAINING).unlink(missing_ok=True)

    def load_finished(self, name: str) -> dict[str, Any] | None:
        """A finished training, None when it is not finished."""
        return self._load(self.finished_path(name))

    def finished_path(self, name: str) -> Path:
        """Where the finished training ``name`` is kept."""
        return self.directory / RUNS / f"{name}.pt"

    @property
    def training_path(self) -> Path:
        """Where the checkpoint of the training in progress is kept."""
        return self.directory / TRAINING

    @staticmethod
    def _load(path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                # torch looks at some checksums only.
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
            state: dict[str, Any] = check_object(torch.load(path, map_location="cpu", weights_only=True), "content")
        except Exception as error:  # whatever the readers of zip files, pickles and tensors raise at wrong bytes
            raise InputError(f"--resume: {path}: is damaged and cannot be loaded: {error}") from error
        return state
