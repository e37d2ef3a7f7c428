"""The benchmark's command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NAME = "python -m bench"
DEFAULT_OUT = Path("peftkernels-bench")


@dataclass(frozen=True)
class Options:
    """As ``python -m bench --help`` describes them."""

    cases: tuple[str, ...] = ()
    list: bool = False
    quick: bool = False
    full: bool = False
    json: Path | None = None
    histogram: Path | None = None
    compare: Path | None = None
    seconds: float | None = None
    threads: int | None = None
    out: Path = DEFAULT_OUT
