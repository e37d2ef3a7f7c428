"""`python -m bench.gpu`: from its options to its files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.cases import Case
    from bench.gpu.device import Device
    from bench.gpu.job import Lineup
    from bench.results import Row

DEFAULT_OUT = Path("peftkernels-bench-gpu")
# A limit counts from here: what is imported later takes seconds, too.
STARTED = time.perf_counter()
SMOKE_SECONDS, SMOKE_TURN = 0.05, 1e-4
CLOSING_SECONDS = 8.0
LINES_WIDTH = 220

EPILOG = """\
written to --out:
  <gpu>.csv         one row for each case and contestant, as in bench/results/, where it is kept and `make report`
                    finds it
  results.json      the same with versions, goals, failures and what was left out
  ratio-*.png       plots

exit codes: 0 done, 1 a result was wrong or a kernel broke, 2 wrong input or no GPU, 130 interrupted
"""


@dataclass(frozen=True)
class Options:
    """As `--help` describes them."""

    out: Path
    device: str
    impl: str
    smoke: bool
    full: bool
    check: bool
    list: bool
    limit: float | None
    seconds: float | None
    cases: tuple[str, ...]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Time lora_linear on a GPU beside the bare library product, the floor and HF peft.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="parts of ids or groups (default: all cases)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"default: ./{DEFAULT_OUT}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --smoke alone")
    parser.add_argument("--impl", default="auto", help="implementation of lora_linear (default: auto)")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases in seconds: shows that the code works")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--full", action="store_true", help="the whole cross product: hours")
    length.add_argument("--check", action="store_true", help="verify odd shapes by every way there is, time nothing")
    length.add_argument("--list", action="store_true", help="print the cases in their order and stop")
    parser.add_argument("--limit", type=_positive, metavar="S", help="seconds for everything (default: no limit)")
    parser.add_argument("--seconds", type=_positive, metavar="S", help="seconds for a case, at most (default: 0.6)")
    found = parser.parse_args(arguments)
    if found.device == "cpu" and not (found.smoke or found.check or found.list):
        parser.error("--device: cpu is for --smoke, --check and --list; the CPU's benchmark is `python -m bench`")
    return Options(**{**vars(found), "cases": tuple(found.cases)})


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, expected a positive number of seconds")
    return value


def missing(package: str) -> str | None:
    """Why `package` cannot be imported; None when it can. Some packages are there and broken."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """The command; returns its exit code. `--limit` counts from `started` (by `time.perf_counter`), else from now."""
    began = time.perf_counter() if started is None else started
    options = parse(arguments)
    if importlib.util.find_spec("rich") is None:
        print("bench.gpu: error: rich is not installed; the tables need it", file=sys.stderr)
        return 2
    # Before the first import of transformers: nothing may be looked up on the network.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from bench.gpu.device import DeviceError

    try:
        return _run(options, began)
    except DeviceError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.gpu: interrupted; what was measured is kept", file=sys.stderr)
        return 130


def _run(options: Options, began: float) -> int:
    from bench.gpu import cases
    from bench.gpu.device import find

    if options.check:
        groups = {"gpu-check": cases.CHECKED}
    else:
        groups = cases.SMOKE if options.smoke else cases.full() if options.full else cases.GROUPS
    ordered = cases.select(cases.in_order(groups), options.cases)
    if not ordered:
        print(f"bench.gpu: error: CASE: no case matches {' '.join(options.cases)}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for group, case in ordered:
            print(f"{group:12} {case.id}")
        print(f"{len(ordered)} cases")
        return 0
    device = find(options.device)
    if options.check:
        from bench.gpu.check import check

        return 0 if check(device, options.impl, [case for _, case in ordered], print) else 1
    return _measure(options, ordered, device, _lineup(options), began)


def _lineup(options: Options) -> Lineup:
    """Who can take part, with a line for whoever cannot."""
    from bench.gpu.job import Lineup
    from peftkernels.backends.registry import backend_status

    unavailable = backend_status()["triton"]
    if unavailable is not None:
        print(f"peftkernels has no Triton kernels here: {unavailable}")
    without_peft = missing("peft")
    if without_peft is not None:
        print(f"HF peft is left out, and goals beside it are not measured: it cannot be imported ({without_peft})")
    without_compiler = missing("triton") if options.device == "cuda" else "not on this device"
    if without_compiler is not None and without_peft is None:
        print(f"peft under torch.compile is left out: {without_compiler}")
    return Lineup(without_peft is None, without_compiler is None, options.impl)


def _measure(
    options: Options, ordered: Sequence[tuple[str, Case]], device: Device, lineup: Lineup, began: float
) -> int:
    from rich.console import Console

    from bench import results
    from bench.gpu import files, job
    from bench.gpu.budget import SECONDS, TURN_SECONDS, Budget

    common, peaks = results.origin(device.name), device.peaks()
    print(
        f"{device.name}: {', '.join(f'{dtype} {rate / 1e12:.0f} TFLOP/s' for dtype, rate in peaks.flops.items())}, "
        f"copies {peaks.memory / 1e12:.2f} TB/s; {len(ordered)} cases",
        flush=True,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    # Tables and plots at the end take a few seconds, too.
    limit = None if options.limit is None else max(0.0, options.limit - (time.perf_counter() - began) - CLOSING_SECONDS)
    seconds = options.seconds or (SMOKE_SECONDS if options.smoke else SECONDS)
    found = job.run(
        ordered,
        device,
        Budget(limit, peaks, seconds),
        common,
        lineup,
        options.out / f"{results.slug(device.name)}.csv",
        say=lambda text: print(text, flush=True),
        turn_seconds=SMOKE_TURN if options.smoke else TURN_SECONDS,
    )
    everything = [case for _, case in ordered]
    files.write_json(options.out / "results.json", found, everything, device, common)
    _draw(found.rows, options.out)
    console = Console() if sys.stdout.isatty() else Console(width=LINES_WIDTH)
    files.print_tables(console, found, everything)
    return 1 if found.failed else 0


def _draw(rows: Sequence[Row], folder: Path) -> None:
    reason = missing("matplotlib")
    if reason is not None:
        print(f"plots are left out: matplotlib cannot be imported ({reason})")
        return
    from bench.gpu.plots import draw_all

    drawn = [plot.path.name for plot in draw_all(rows, folder)]
    print(f"plots: {', '.join(drawn) or 'too few cases were measured to draw any'}")


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
