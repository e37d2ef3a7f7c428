"""The comparison's command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.options import Options

# As many steps as the demo: with 60, fixed-rank LoRA reaches 64 % instead of 70 %. Half its tokens, since 48 of a text
# say no more than 32 (64 % both, after 60 steps) and take 1.4 times as long.
STEPS, QUICK_STEPS = 100, 12
TOKENS, QUICK_TOKENS = 32, 16
SEEDS, QUICK_SEEDS = 5, 2
# More threads in one training would save less than as many trainings side by side.
THREADS = 1
DEFAULT_OUT = Path("peftkernels-comparison")


@dataclass(frozen=True)
class ComparisonOptions:
    """As ``python -m demo --help`` describes them.

    Attributes:
        allocators: names from the command line, "all" among them allowed.
        demo: the options that a comparison shares with the demo; ``seed`` is the first of the seeds.
        seeds: how many seeds the comparison uses.
        jobs: trainings side by side.
        threads: processor threads of each.
    """

    allocators: tuple[str, ...]
    demo: Options
    seeds: int
    jobs: int
    threads: int
