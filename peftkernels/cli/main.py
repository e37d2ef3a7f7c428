"""Command line: ``peftkernels doctor`` and ``report``. Arguments only; the work is elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peftkernels import __version__
from peftkernels.cli.process import prepare_process
from peftkernels.cli.report import command as report

_IN_THE_REPOSITORY = ("demo", "bench")


def console() -> int:
    """The command ``peftkernels`` in a process of its own; returns what `main` does."""
    prepare_process()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if arguments and arguments[0] in _IN_THE_REPOSITORY:
        name = arguments[0]
        parser.error(
            f"{name} is not part of the installed package: run `python -m {name}` or `make {name}` at the root of a "
            "checkout of the repository"
        )
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        return report.run_report(chosen.directory, chosen.out, as_json=chosen.json)
    from peftkernels.cli.doctor import run_doctor

    return run_doctor(as_json=chosen.json, with_speed=chosen.speed)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="peftkernels", description="Fused kernels for fine-tuning through low-rank adapters with adaptive ranks."
    )
    parser.add_argument("--version", action="version", version=f"peftkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say what this installation can run, why the rest cannot, and how fast it is",
        description="Print versions, processor features and backends. Every backend that can run is run once and "
        "compared with the reference; exit code 0 when the package can serve calls, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.add_argument(
        "--speed", action="store_true", help="also time three layers beside plain torch and HF peft (twenty seconds)"
    )
    _add_report(
        commands.add_parser(
            "report",
            help="show what an allocator decided in a run, and why",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=report.DESCRIPTION,
            epilog=report.EPILOG,
        )
    )
    return parser


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=Path, metavar="RUN_DIR", help="the directory of a log or of a demo")
    command.add_argument("--out", type=Path, metavar="DIR", help=f"where to write (default: RUN_DIR/{report.REPORT})")
    command.add_argument("--json", action="store_true", help="print the content of report.json instead of file names")
