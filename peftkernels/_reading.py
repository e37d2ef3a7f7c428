"""Reading JSON that others wrote: what is wrong with it is said with the file, the line and the field."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DEEPEST = 64
MOST_BYTES = 1 << 28
# Counts and steps: what an int64 and a float64 both hold.
MOST = 1 << 53


def read_json(path: Path, where: str | None = None) -> Any:
    """The content of a JSON file; `where` stands for the file in errors.

    Raises:
        ValueError: as for `parse_json`, and for a file of more than 256 MiB.
        OSError: the file cannot be read.
    """
    where = str(path) if where is None else where
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{where}: found {size:,} bytes, expected at most {MOST_BYTES:,}")
    return parse_json(path.read_bytes(), where, unique=True)


def parse_json(content: bytes, where: str, *, unique: bool = False) -> Any:
    """What JSON in UTF-8 says; `where` names its place in errors.

    Raises:
        ValueError: it is no JSON, is nested deeper than 64 levels, holds half of a surrogate pair (no text that can be
            written again), or, with unique=True, holds a name twice in one object.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{_at(where, line)}: found a byte that is not UTF-8, {content[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{_at(where, error.lineno)}: found no JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: found values nested too deep, expected at most {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value, where)
    if "\\ud" in text.lower():
        for place, found in _strings(value):
            _check_text(found, f"{where}: {place}" if place else where)
    return value


def check_object(value: Any, where: str) -> dict[str, Any]:
    """`value` where it is a JSON object; raises ValueError otherwise, as all of these do."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {shown(value)}, expected a JSON object")
    return value


def check_whole(value: Any, where: str, least: int = 0, most: int = MOST) -> int:
    """`value` where it is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        wanted = f"a whole number, at least {least}" if most == MOST else f"a whole number from {least} to {most}"
        raise ValueError(f"{where}: found {shown(value)}, expected {wanted}")
    return value


def check_number(value: Any, where: str) -> float:
    """`value` where it is a finite number that float64 holds."""
    if not is_number(value):
        raise ValueError(f"{where}: found {shown(value)}, expected a finite number")
    return value


def check_not_below_zero(value: Any, where: str) -> float:
    """`value` where it is a finite number of at least 0."""
    if check_number(value, where) < 0:
        raise ValueError(f"{where}: found {value}, expected at least 0")
    return value


def is_number(value: Any) -> bool:
    """Return True if `value` is a finite number that float64 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_flag(value: Any, where: str) -> bool:
    """`value` where it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}: found {shown(value)}, expected true or false")
    return value


def check_list(value: Any, where: str) -> list[Any]:
    """`value` where it is a list."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: found {shown(value)}, expected a list")
    return value


def check_text(value: Any, where: str) -> str:
    """`value` where it is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: found {shown(value)}, expected a string")
    return value


def shown(value: Any) -> str:
    """A value as it stands in an error: shortened where it is long or deep."""
    return reprlib.repr(value)


def _at(where: str, line: int) -> str:
    return f"{where}, line {line}" if ", line " not in where else where


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)}: found twice in one object, expected once")
    return values


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for whole in level if isinstance(whole, (dict, list)) for part in _parts(whole)]
        if not level:
            return
    raise ValueError(f"{where}: found values nested too deep, expected at most {DEEPEST} levels")


def _parts(whole: Mapping[str, Any] | Sequence[Any]) -> Sequence[Any]:
    return list(whole.values()) if isinstance(whole, Mapping) else whole


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a value that is not too deep, names of objects included, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield place, name
            yield from _strings(part, f"{place}.{name}" if place else ascii(name)[1:-1])
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _strings(part, f"{place}[{index}]")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where}: found half of a surrogate pair, {half}, expected text that is UTF-8") from None
