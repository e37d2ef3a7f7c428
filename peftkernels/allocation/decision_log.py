"""A log of every decision of an allocator, as JSON Lines that a kill cannot spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from peftkernels._files import write_atomically
from peftkernels.allocation.log_lines import LOG_FORMAT, RANKS, START, Entry, LogError, encode, scan


class DecisionLog:
    """An observer that appends to a file, one JSON object a line:

        {"event": "start", "step", "format", "every", "strategy", "settings", "modules", "unit"}    first, once
        {"event": "ranks", "step", "module", "scores", "threshold", "kept", "budget"}    per decision and module
        {"event": "loss" | "skipped" | "rollback" | "frozen" | …, "step", …}             what else happened

    `Observer` says what each field holds; infinite numbers are the strings "inf" and "-inf". `read_log` reads it.

    path   where to write; its directory is made. A log that is there already is continued when a run resumed at step s
           starts: what lies after s is dropped, so that the file ends as that of a run never interrupted, to the byte.
           A run that starts at step 0 thus starts its log anew.
    every  log a decision only when at least so many steps have passed since the last one logged. `close` adds the last
           decision that was left out, so that the log ends with the final ranks.

    Each decision is handed to the system in one write. A kill in the middle of it leaves a torn end, which readers pass
    over and the next start cuts off. Call `sync` before saving a checkpoint, so that a machine that loses power does
    not keep the checkpoint and lose the log before it.

    Raises TypeError or ValueError for arguments that cannot be; `started` raises LogError (a ValueError), with the file
    left as it is, where the file is no decision log or one of a run with other facts.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every: found {every!r} ({type(every).__name__}), expected an int")
        if every < 1:
            raise ValueError(f"every: found {every}, expected at least 1")
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"path: found the directory {self.path}, expected a file or nothing")
        self.every = every
        self._file: BinaryIO | None = None
        self._names: list[str] = []
        self._last: int | None = None
        self._left_out: tuple[int, bytes] | None = None

    def started(self, facts: Mapping[str, Any]) -> None:
        """Begin the log, or continue it from step `facts["step"]`."""
        self._release()
        step = facts["step"]
        start = {"event": START, "step": step, "format": LOG_FORMAT, "every": self.every, **facts}
        start.pop("rollbacks", None)
        line = encode(start)
        self._names = [module["name"] for module in facts["modules"]]
        self._last = self._left_out = None
        kept = self._kept_of_earlier(json.loads(line), step, facts.get("rollbacks"))
        content = self.path.read_bytes() if kept else b""
        parts = [content[entry.begin : entry.end] for entry in self._thinned(kept, content)]
        whole = b"".join(parts) if kept else line
        if whole != content or not kept:
            write_atomically(self.path, lambda file: file.write(whole))
        self._file = self.path.open("ab", buffering=0)

    def decided(
        self,
        step: int,
        budget: float,
        threshold: float,
        scores: Sequence[Sequence[float]],
        kept: Sequence[Sequence[bool]],
    ) -> None:
        """Log a decision, unless the last one logged is fewer than `every` steps back."""
        for name, value in (("scores", scores), ("kept", kept)):
            if len(value) != len(self._names):
                raise ValueError(f"{name}: found {len(value)} modules, expected {len(self._names)}")
        content = b"".join(
            encode(
                {
                    "event": RANKS,
                    "step": step,
                    "module": name,
                    "scores": list(own),
                    "threshold": threshold,
                    "kept": [bool(keep) for keep in keeps],
                    "budget": budget,
                }
            )
            for name, own, keeps in zip(self._names, scores, kept, strict=True)
        )
        if self._is_due(step):
            self._append(content)
            self._last, self._left_out = step, None
        else:
            self._left_out = (step, content)

    def happened(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Log an event."""
        taken = {"event", "step"}.intersection(details)
        if kind in (START, RANKS) or taken:
            found = f"kind {kind!r}" if not taken else f"details with {sorted(taken)}"
            raise ValueError(f"happened: found {found}, expected other names, since the log has them for its own")
        self._append(encode({"event": kind, "step": step, **details}))
        if kind == "rollback":
            self._rolled_back(details["to"])

    def sync(self) -> None:
        """Return when all that was logged is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Log the last decision if `every` left it out, and close the file; does nothing when closed already."""
        if self._file is not None and self._left_out is not None:
            self._append(self._left_out[1])
            self._left_out = None
        self._release()

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        return self._last is None or step - self._last >= self.every

    def _rolled_back(self, to: int) -> None:
        self._left_out = None
        # Decisions after the step returned to will be taken again.
        if self._last is not None and self._last > to:
            self._last = None

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, content: bytes) -> None:
        if self._file is None:
            raise RuntimeError(f"the log {self.path} is not open: started() opens it, close() closes it")
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            # A part of a line would make the next one unreadable.
            os.ftruncate(self._file.fileno(), before)
            raise

    def _kept_of_earlier(self, start: dict[str, Any], step: int, rollbacks: int | None) -> list[Entry]:
        """The entries of the file up to `step`, none where the log begins here."""
        if not self.path.exists():
            return []
        entries, _ = scan(self.path)
        if not entries:
            if self.path.stat().st_size and not _torn_start(self.path):
                raise LogError(f"{self.path}: found a file that is no decision log, expected one or nothing")
            return []
        earlier = entries[0].lines[0]
        different = sorted(
            name for name in earlier.keys() | start.keys() if name != "step" and earlier.get(name) != start.get(name)
        )
        if different:
            raise LogError(
                f"{self.path}: holds the log of another run, with other {', '.join(different)}; expected the same "
                "run's or nothing: name another file, or move this one away"
            )
        if step < max(1, entries[0].step):
            return []
        timeline = _timeline_of(entries, step) if rollbacks is None else rollbacks
        return [entry for entry in entries if (entry.timeline, entry.reached) <= (timeline, step)]

    def _thinned(self, entries: list[Entry], content: bytes) -> list[Entry]:
        """The entries without decisions that only a `close` put there; sets which decision was the last."""
        thinned = []
        for entry in entries:
            if entry.event == RANKS and not self._is_due(entry.step):
                self._left_out = (entry.step, content[entry.begin : entry.end])
                continue
            thinned.append(entry)
            if entry.event == RANKS:
                self._last, self._left_out = entry.step, None
            elif entry.event == "rollback":
                self._rolled_back(entry.reached)
        return thinned


def _timeline_of(entries: list[Entry], step: int) -> int:
    """The last timeline that reached `step`: checkpoints are newer than the rollbacks before them."""
    return max((entry.timeline for entry in entries if entry.reached >= step), default=entries[-1].timeline)


def _torn_start(path: Path) -> bool:
    """Whether the file can be the beginning of a start line."""
    begin = b'{"event": "start"'
    content = path.read_bytes()
    return content.startswith(begin) or begin.startswith(content)
