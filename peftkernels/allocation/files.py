"""Small JSON files that say what kind they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peftkernels._files import write_atomically
from peftkernels._reading import check_object, read_json, shown


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as JSON: all of it, or nothing, in folders that are made where they are missing."""
    data = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    write_atomically(Path(path), lambda file: file.write(data))


def read_kind(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read the mapping that `write_json` wrote, whose key "kind" must say `kind`.

    Raises:
        ValueError: For another file.
    """
    value = check_object(read_json(Path(path)), os.fspath(path))
    if value.get("kind") != kind:
        raise ValueError(f"{os.fspath(path)}: found {shown(value.get('kind'))}, expected {kind!r}")
    return value
