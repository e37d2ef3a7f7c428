"""A log of every decision of an allocator, as JSON Lines that a kill cannot spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from peftkernels._files import write_atomically
from peftkernels.allocation.logs.log_lines import LOG_FORMAT, RANKS, START, Entry, LogError, encode, read_start, scan


class DecisionLog:
    """An observer that appends to a file, one JSON object a line:

        {"event": "start", "step", "format", "every", "strategy", "settings", "modules", "unit"}    first, once
        {"event": "ranks", "step", "module", "threshold", "kept", "budget", "scores"}    per decision and module
        {"event": "loss" | "skipped" | "rollback" | "frozen" | …, "step", …}             what else happened

    `Observer` says what each field holds; infinite numbers are the strings "inf" and "-inf". `read_log` reads it.

    Each decision is handed to the system in one write. A kill in the middle of it leaves a torn end, which readers pass
    over and the next start cuts off. Call `sync` before saving a checkpoint, so that a machine that loses power does
    not keep the checkpoint and lose the log before it.

    Args:
        path: Where to write; its directory is made. A log that is there already is continued when a run resumed at step
            s logs something: what lies after s is dropped, so that the file ends as that of a run never interrupted, to
            the byte. A run that starts at step 0 thus starts its log anew, unless it loads a saved state first.
        every: Log the scores of a decision only when at least so many steps have passed since the last ones logged;
            scores are most of a log. Masks, budget and threshold are always logged.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise. `on_start` raises LogError, a ValueError, with the file left as it is, where that is no
            decision log or one of a run with other facts.
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
        self._start: tuple[bytes, int, int | None] | None = None
        self._names: list[str] = []
        self._scored: int | None = None

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """Take note of the run, and of the step that it goes on from; the file is opened when something is logged."""
        self._release()
        start = {"event": START, "step": facts["step"], "format": LOG_FORMAT, "every": self.every, **facts}
        start.pop("rollbacks", None)
        line = encode(start)
        if self.path.exists():
            _check_same_run(self.path, json.loads(line))
        self._start = (line, facts["step"], facts.get("rollbacks"))
        self._names = [module["name"] for module in facts["modules"]]
        self._scored = None

    def on_decision(
        self,
        step: int,
        budget: float,
        thresholds: Sequence[float],
        scores: Sequence[Sequence[float]],
        kept: Sequence[Sequence[bool]],
    ) -> None:
        """Log a decision, with its scores when they are due."""
        for name, value in (("thresholds", thresholds), ("scores", scores), ("kept", kept)):
            if len(value) != len(self._names):
                raise ValueError(f"{name}: found {len(value)} modules, expected {len(self._names)}")
        self._open()
        due = self._scored is None or step - self._scored >= self.every
        lines = []
        for name, own, threshold, keeps in zip(self._names, scores, thresholds, kept, strict=True):
            line = {"event": RANKS, "step": step, "module": name, "threshold": threshold}
            line |= {"kept": [bool(keep) for keep in keeps], "budget": budget}
            lines.append(encode(line | {"scores": list(own)} if due else line))
        self._append(b"".join(lines))
        if due:
            self._scored = step

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Log an event."""
        taken = {"event", "step"}.intersection(details)
        if kind in (START, RANKS) or taken:
            found = f"kind {kind!r}" if not taken else f"details with {sorted(taken)}"
            raise ValueError(f"on_event: found {found}, expected other names, since the log has them for its own")
        self._append(encode({"event": kind, "step": step, **details}))
        if kind == "rollback":
            self._rolled_back(details["to"])

    def sync(self) -> None:
        """Return when all that was logged is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; does nothing when closed already."""
        self._release()
        self._start = None

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rolled_back(self, to: int) -> None:
        # Scores of steps after the one returned to will be logged again.
        if self._scored is not None and self._scored > to:
            self._scored = None

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        """Begin the file, or cut it where the run goes on, unless that is done."""
        if self._file is not None:
            return
        if self._start is None:
            raise RuntimeError(f"the log {self.path} was not started, or is closed: on_start() comes first")
        line, step, rollbacks = self._start
        kept = self._kept_of_earlier(step, rollbacks)
        content = self.path.read_bytes() if kept else b""
        whole = b"".join(content[entry.begin : entry.end] for entry in kept) or line
        for entry in kept:
            if entry.event == "rollback":
                self._rolled_back(entry.reached)
            elif entry.event == RANKS and "scores" in entry.lines[0]:
                self._scored = entry.step
        if whole != content:
            write_atomically(self.path, lambda file: file.write(whole))
        self._file = self.path.open("ab", buffering=0)

    def _append(self, content: bytes) -> None:
        self._open()
        assert self._file is not None
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            # A part of a line would make the next one unreadable.
            os.ftruncate(self._file.fileno(), before)
            raise

    def _kept_of_earlier(self, step: int, rollbacks: int | None) -> list[Entry]:
        """The entries of the file up to `step`, none where the log begins here."""
        if not self.path.exists():
            return []
        entries, _ = scan(self.path)
        if not entries or step < max(1, entries[0].step):
            return []
        timeline = _timeline_of(entries, step) if rollbacks is None else rollbacks
        return [entry for entry in entries if (entry.timeline, entry.reached) <= (timeline, step)]


def _timeline_of(entries: list[Entry], step: int) -> int:
    """The last timeline that passed `step`: a checkpoint is newer than the rollbacks before it."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for entry in entries:
        first.setdefault(entry.timeline, entry.reached)
        last[entry.timeline] = max(entry.reached, last.get(entry.timeline, entry.reached))
    passed = [timeline for timeline in first if first[timeline] <= step <= last[timeline]]
    return max(passed, default=entries[-1].timeline)


def _check_same_run(path: Path, start: dict[str, Any]) -> None:
    """Raise LogError where the file is not a log with this start, the step apart, or the torn beginning of one."""
    earlier = read_start(path)
    if earlier is None:
        return
    names = sorted((earlier.keys() | start.keys()) - {"step"})
    different = [name for name in names if earlier.get(name) != start.get(name)]
    if different:
        raise LogError(
            f"{path}: holds the log of another run, with other {', '.join(different)}; expected the same run's or "
            "nothing: name another file, or move this one away"
        )
