"""Writing small JSON files so that an interrupted write leaves the old one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as JSON: all of it, or nothing. Folders above it are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


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
