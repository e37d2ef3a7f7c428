"""The lines of a decision log: how they are written, and what of a file that was cut short can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG_FORMAT = 1
START = "start"
RANKS = "ranks"
# What every log begins with, as `encode` writes it.
_BEGIN = b'{"event": "start"'


class LogError(ValueError):
    """A decision log that cannot be used; says which file, and which line where there is one."""


@dataclass(frozen=True)
class Entry:
    """One thing that was logged: the start, a decision (one line for each module), or an event.

    first       number of its first line, from 1
    timeline    rollbacks so far, this one included where it is one
    reached     the step that the run had then reached: `step`, or the one a rollback returned to
    begin, end  its bytes in the file
    """

    event: str
    step: int
    lines: tuple[dict[str, Any], ...]
    first: int
    timeline: int
    reached: int
    begin: int
    end: int


def encode(content: Mapping[str, Any]) -> bytes:
    """One line. Numbers that JSON lacks are written as the strings "nan", "inf" and "-inf"."""
    return (json.dumps(_writable(content), allow_nan=False, ensure_ascii=False) + "\n").encode()


def number(value: Any) -> float:
    """A number as `encode` wrote it. Raises ValueError for anything else."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")):
        raise ValueError(f"found {value!r}, expected a number")
    return float(value)


def _writable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"found {value!r} ({type(value).__name__}), expected plain numbers, strings, lists and mappings")


def scan(path: Path) -> tuple[list[Entry], bool]:
    """What the log holds, in order, and whether it was cut short.

    A last line without its line end, and a last decision that lacks modules, are what a kill leaves: they are not part
    of the entries. Raises LogError for anything else that is not a log's, OSError where the file cannot be read.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    entries: list[Entry] = []
    names: list[str] = []
    pending: list[dict[str, Any]] = []
    timeline = begin = end = 0
    for index, raw in enumerate(content[:whole].splitlines(keepends=True), start=1):
        line = _parse(path, index, raw)
        end += len(raw)
        event, step = line["event"], line["step"]
        if (event == START) != (not entries):
            found = "a second start" if entries else f"the event {event!r}"
            raise LogError(f"{path}, line {index}: found {found}, expected {'none' if entries else 'the start'}")
        if event == START:
            names = _module_names(path, index, line)
        elif event == RANKS:
            _check_ranks(path, index, line, names[len(pending)], pending)
            pending.append(line)
            if len(pending) < len(names):
                continue
        elif pending:
            raise LogError(
                f"{path}, line {index}: found the event {event!r}, expected the ranks of {names[len(pending)]!r} at "
                f"step {pending[0]['step']}"
            )
        reached = step
        if event == "rollback":
            timeline, reached = timeline + 1, line.get("to")
            if not isinstance(reached, int):
                raise LogError(f"{path}, line {index}: found to = {reached!r}, expected the step rolled back to")
        lines = tuple(pending) if event == RANKS else (line,)
        entries.append(Entry(event, step, lines, index + 1 - len(lines), timeline, reached, begin, end))
        pending, begin = [], end
    return entries, begin < len(content)


def read_start(path: Path) -> dict[str, Any] | None:
    """The first line of a log; None where it is missing or torn. Raises LogError for a file that is no log."""
    with path.open("rb") as file:
        raw = file.readline()
    if not raw.endswith(b"\n"):
        if raw.startswith(_BEGIN) or _BEGIN.startswith(raw):
            return None
        raise LogError(f"{path}, line 1: found no start of a decision log, expected one")
    line = _parse(path, 1, raw)
    if line["event"] != START:
        raise LogError(f"{path}, line 1: found the event {line['event']!r}, expected the start")
    _module_names(path, 1, line)
    return line


def _parse(path: Path, index: int, raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise LogError(f"{path}, line {index}: is not JSON: {error}") from None
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        raise LogError(f"{path}, line {index}: found no event, expected a line of a decision log")
    if not isinstance(line.get("step"), int):
        raise LogError(f"{path}, line {index}: found step {line.get('step')!r}, expected a whole number")
    return line


def _module_names(path: Path, index: int, line: dict[str, Any]) -> list[str]:
    if line.get("format") != LOG_FORMAT:
        raise LogError(f"{path}, line {index}: found format {line.get('format')!r}, expected {LOG_FORMAT}")
    modules = line.get("modules")
    if not isinstance(modules, list) or not modules:
        raise LogError(f"{path}, line {index}: found modules {modules!r}, expected a list of at least one")
    for module in modules:
        if not (isinstance(module, dict) and isinstance(module.get("name"), str) and _is_rank(module.get("rank"))):
            raise LogError(f"{path}, line {index}: found the module {module!r}, expected one with name and rank")
    names = [module["name"] for module in modules]
    if len(set(names)) < len(names):
        raise LogError(f"{path}, line {index}: found a module's name twice, expected each once")
    if not isinstance(line.get("settings", {}), dict):
        raise LogError(f"{path}, line {index}: found settings {line['settings']!r}, expected a mapping")
    return names


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_ranks(path: Path, index: int, line: dict[str, Any], name: str, pending: list[dict[str, Any]]) -> None:
    if line.get("module") != name or (pending and line["step"] != pending[0]["step"]):
        step = pending[0]["step"] if pending else line["step"]
        raise LogError(
            f"{path}, line {index}: found the ranks of {line.get('module')!r} at step {line['step']}, expected "
            f"those of {name!r} at step {step}"
        )
