"""Files that several write at once, or whose writer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from peftkernels._files import PARTIAL, write_atomically


def _whole(value: int, size: int = 200_000) -> bytes:
    return bytes([value]) * size


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def test_threads_that_write_one_file_never_tear_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    _write(path, _whole(0))
    errors: list[BaseException] = []

    def writer(value: int) -> None:
        try:
            for _ in range(30):
                _write(path, _whole(value))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=writer, args=(value,)) for value in (1, 2, 3)]
    for thread in threads:
        thread.start()
    reads = 0
    while any(thread.is_alive() for thread in threads):
        content = path.read_bytes()
        assert content == _whole(content[0])
        reads += 1
    for thread in threads:
        thread.join()
    assert not errors and reads > 0
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_file_is_locked_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that has opened its file and not locked it yet must not get the lock before the file is gone."""
    fcntl = pytest.importorskip("fcntl")
    partial = tmp_path / f".state.0123{PARTIAL}"
    partial.write_bytes(b"")
    unlink, locked = Path.unlink, []

    def watched(self: Path, missing_ok: bool = False) -> None:
        if self == partial:
            with partial.open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(True)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    _write(tmp_path / "state", _whole(1))
    assert locked and not partial.exists()


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "state [1]"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom peftkernels._files import write_atomically\n"
        "def slow(file):\n    file.write(b'half'); file.flush(); print('begun', flush=True); time.sleep(60)\n"
        "write_atomically(Path(sys.argv[1]), slow)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"begun\n"
        _write(path, _whole(1))
        left = [file for file in tmp_path.iterdir() if file.name.endswith(PARTIAL)]
        assert len(left) == 1, "a writer that is still running lost its file"
        child.send_signal(signal.SIGKILL)
        child.wait()
    _write(path, _whole(2))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == _whole(2)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    _write(path, b"old")

    def failing(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, failing)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_new_files_have_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _write(tmp_path / "state", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640
