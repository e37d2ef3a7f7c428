"""The comparison's command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftkernels.cli.demo.options import Options

# As many steps as the demo: after 60 of them adapters are no better than a trained head alone, and there is nothing to
# compare. Half its tokens: 60 % of its time, and a text's first words say most.
STEPS, QUICK_STEPS = 100, 12
TOKENS, QUICK_TOKENS = 32, 16
SEEDS, QUICK_SEEDS = 5, 2
# More threads in one training would save less than as many trainings side by side.
THREADS = 1
DEFAULT_OUT = Path("peftkernels-comparison")


@dataclass(frozen=True)
class ComparisonOptions:
    """As ``peftkernels demo --help`` describes them.

    allocators  names from the command line, "all" among them allowed
    demo        the options that a comparison shares with the demo; ``seed`` is the first of the seeds
    seeds       how many seeds the comparison uses
    jobs        trainings side by side
    threads     processor threads of each
    """

    allocators: tuple[str, ...]
    demo: Options
    seeds: int
    jobs: int
    threads: int
