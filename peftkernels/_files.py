"""Files that are whole or old, whatever interrupts the writing."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
# Where files cannot be locked, one that nobody has written to for so long is taken for abandoned.
_ABANDONED_SECONDS = 24 * 3600


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a file beside ``path`` and move it to ``path`` once it is on the disk.

    A call that is interrupted leaves what was there before. Processes, threads and machines that share the folder may
    write the same path at once: the last one to finish stands. What killed writers of this path left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path, write) as partial:
        os.replace(partial, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` of a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def written_beside(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A new file beside ``path`` that holds what ``write`` wrote and is on the disk, for the caller to move to its
    place; at the end it is gone from where it was written, moved or not."""
    remove_abandoned(path.parent, path.name)
    partial, file = _created_beside(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            yield partial
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on the disk, where the file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove from ``folder`` what writers that no longer run have left of the file ``name``, or of any file."""
    wanted = "*" if name is None else escape(name)
    for partial in folder.glob(f".{wanted}.*{PARTIAL}"):
        with suppress(OSError):
            _remove_if_abandoned(partial)


def _created_beside(path: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked while it is open: the system ends the lock with the process, however that ends. A process
    number would say nothing to another machine or container."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
        file = partial.open("xb")
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        # Somebody may have come between opening and locking, and taken the file for abandoned.
        if partial.exists():
            return partial, file
        file.close()


def _remove_if_abandoned(partial: Path) -> None:
    if fcntl is not None:
        with partial.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass
            else:
                # Still locked: a writer that has opened it and is about to lock it waits, and finds it gone.
                partial.unlink()
                return
    if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
        partial.unlink()
