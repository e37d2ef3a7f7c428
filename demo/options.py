"""The demo's command-line options, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.recipe import RUN_NAMES

STEPS, QUICK_STEPS = 100, 20
TOKENS, QUICK_TOKENS = 64, 32
DEFAULT_OUT = Path("peftkernels-demo")


@dataclass(frozen=True)
class Options:
    """As ``python -m demo --help`` describes them; ``runs`` None means all that can run."""

    seed: int = 0
    steps: int = STEPS
    batch_size: int = 32
    max_tokens: int = TOKENS
    quick: bool = False
    out: Path = DEFAULT_OUT
    model: Path | None = None
    data: Path | None = None
    resume: bool = False
    runs: tuple[str, ...] | None = None
    no_peft: bool = False
    threads: int | None = None
    json: bool = False


def parse_runs(text: str) -> tuple[str, ...]:
    """Names of runs from a comma-separated list, in the order in which they are trained.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in RUN_NAMES]
    if unknown or not names:
        found = f"unknown run {unknown[0]!r}" if unknown else "no run"
        raise ValueError(f"{found}; expected some of {','.join(RUN_NAMES)}")
    return tuple(name for name in RUN_NAMES if name in names)
