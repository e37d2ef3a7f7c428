"""Small JSON files that say what kind they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peftkernels._files import write_atomically


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as JSON: all of it, or nothing, in folders that are made where they are missing."""
    data = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    write_atomically(Path(path), lambda file: file.write(data))


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The mapping that `write_json` wrote; `kind` is what its key "kind" must say. Raises ValueError for others."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: found no JSON ({error}), expected {kind}") from error
    found = value.get("kind") if isinstance(value, dict) else type(value).__name__
    if found != kind:
        raise ValueError(f"{os.fspath(path)}: found {found!r}, expected {kind!r}")
    checked: dict[str, Any] = value
    return checked
