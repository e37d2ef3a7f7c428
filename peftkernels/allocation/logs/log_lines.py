"""The lines of a decision log: how they are written, and what of a file that was cut short can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkernels._reading import check_object, check_whole, is_number, parse_json, shown

LOG_FORMAT = 1
START = "start"
RANKS = "ranks"
# Of one module: a damaged number must not decide how much memory is taken.
MOST_RANKS = 1 << 20
# What every log begins with, as `encode` writes it.
_BEGIN = b'{"event": "start"'


class LogError(ValueError):
    """A decision log that cannot be used; says which file, and which line where there is one."""


@dataclass(frozen=True)
class Entry:
    """One thing that was logged: the start, a decision (one line for each module), or an event.

    Attributes:
        event: What it is: "start", "ranks" or an event's kind.
        step: The optimizer step.
        lines: What the lines say.
        first: Number of its first line, from 1.
        timeline: Rollbacks so far, this one included where it is one.
        reached: The step that the run had then reached: `step`, or the one a rollback returned to.
        begin: Where its bytes begin in the file.
        end: Where they end.
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
    """Return a number as `encode` wrote it.

    Raises:
        ValueError: For anything else.
    """
    if not (is_number(value) or value in ("nan", "inf", "-inf")):
        raise ValueError(f"found {shown(value)}, expected a number")
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
    """Read what a log holds.

    A last line without its line end, and a last decision that lacks modules, are what a kill leaves: they are not part
    of the entries.

    Returns:
        The entries, in order, and True if the log was cut short.

    Raises:
        LogError: For anything else that is not a log's.
        OSError: Where the file cannot be read.
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
            _check(check_whole, reached, f"{path}, line {index}: to", most=step)
        lines = tuple(pending) if event == RANKS else (line,)
        entries.append(Entry(event, step, lines, index + 1 - len(lines), timeline, reached, begin, end))
        pending, begin = [], end
    return entries, begin < len(content)


def read_start(path: Path) -> dict[str, Any] | None:
    """Return the first line of a log; None where it is missing or torn.

    Raises:
        LogError: For a file that is no log.
    """
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
    where = f"{path}, line {index}"
    line: dict[str, Any] = _check(check_object, _check(parse_json, raw, where), where)
    if not isinstance(line.get("event"), str):
        raise LogError(f"{where}: found no event, expected a line of a decision log")
    _check(check_whole, line.get("step"), f"{where}: step")
    return line


def _check(check: Callable[..., Any], value: Any, where: str, **limits: int) -> Any:
    try:
        return check(value, where, **limits)
    except ValueError as error:
        raise LogError(str(error)) from None


def _module_names(path: Path, index: int, line: dict[str, Any]) -> list[str]:
    where = f"{path}, line {index}"
    if line.get("format") != LOG_FORMAT:
        raise LogError(f"{where}: found format {shown(line.get('format'))}, expected {LOG_FORMAT}")
    modules = line.get("modules")
    if not isinstance(modules, list) or not modules:
        raise LogError(f"{where}: found modules {shown(modules)}, expected a list of at least one")
    for module in modules:
        if not (isinstance(module, dict) and isinstance(module.get("name"), str) and _is_rank(module.get("rank"))):
            raise LogError(f"{where}: found the module {shown(module)}, expected one with name and rank")
    names = [module["name"] for module in modules]
    if len(set(names)) < len(names):
        raise LogError(f"{where}: found a module's name twice, expected each once")
    _check(check_object, line.get("settings", {}), f"{where}: settings")
    return names


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANKS


def _check_ranks(path: Path, index: int, line: dict[str, Any], name: str, pending: list[dict[str, Any]]) -> None:
    if line.get("module") != name or (pending and line["step"] != pending[0]["step"]):
        step = pending[0]["step"] if pending else line["step"]
        raise LogError(
            f"{path}, line {index}: found the ranks of {line.get('module')!r} at step {line['step']}, expected "
            f"those of {name!r} at step {step}"
        )
