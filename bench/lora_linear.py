"""Times lora_linear against the bare frozen layer it extends and against eager LoRA, as ratios within a round.

All contestants run in one process, turn by turn on the same inputs, and each round gives one ratio to the frozen layer;
the median and quartiles of the ratios are kept. Rounds in which other processes used more than 6 % of the machine are
discarded and counted. Before a case is timed, its results are compared with float64 ones.

    python -m bench.lora_linear [--dtype float32 bfloat16] [--widths 384x384 …] [--tokens 1 128 …] [--out FILE.csv]
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import peftkernels
from peftkernels import lora_linear
from peftkernels.cli.demo.load import ForeignLoad
from peftkernels.cli.machine import machine

WIDTHS = ("384x384", "768x768", "768x3072", "3072x768", "1024x1024", "2048x2048", "4096x4096")
TOKENS = (1, 128, 512, 2048)
PASSES = ("forward", "forward+backward")
RANK = 16
SCALING = 2.0
MOST_FOREIGN_SHARE = 0.06
FROZEN, EAGER, FLOOR, FUSED = "frozen", "eager LoRA", "library GEMM + addmm", "peftkernels"


@dataclass(frozen=True)
class Case:
    """One measurement: a layer of K inputs and N outputs on M tokens."""

    K: int
    N: int
    M: int
    dtype: str
    direction: str


@dataclass(frozen=True)
class Row:
    """One line of the results: times in microseconds, ratios to the frozen layer of the same round."""

    K: int
    N: int
    M: int
    rank: int
    dtype: str
    direction: str
    contestant: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    rounds: int
    discarded: int
    disturbed: bool
    threads: int
    processor: str
    torch: str
    peftkernels: str
    commit: str
    date: str


class Layer:
    """Random weights and inputs of a case, and each contestant as a function of a turn."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(case.K * 31 + case.N * 7 + case.M)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.weight = normal(case.N, case.K, scale=case.K**-0.5)
        self.bias = normal(case.N)
        self.lora_A = normal(RANK, case.K, scale=case.K**-0.5)
        self.lora_B = normal(case.N, RANK, scale=0.1)
        # Inputs rotate so that they do not stay in cache between turns.
        self.inputs = [normal(case.M, case.K) for _ in range(4)]
        self.grad_y = normal(case.M, case.N)
        if self.trains:
            self.lora_A.requires_grad_()
            self.lora_B.requires_grad_()

    @property
    def trains(self) -> bool:
        return self.case.direction == "forward+backward"

    def frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def eager(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * SCALING

    def fused(self, x: Tensor, impl: str = "cpu") -> Tensor:
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, bias=self.bias, scaling=SCALING, impl=impl)

    def contestants(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {
            FROZEN: self.frozen,
            EAGER: self.eager,
            FLOOR: lambda x: self.fused(x, "eager"),
            FUSED: self.fused,
        }

    def run(self, contestant: Callable[[Tensor], Tensor], turn: int) -> None:
        x = self.inputs[turn % len(self.inputs)]
        if not self.trains:
            with torch.no_grad():
                contestant(x)
            return
        self.lora_A.grad = self.lora_B.grad = None
        contestant(x.detach().requires_grad_()).backward(self.grad_y)

    def verify(self) -> None:
        """Raise unless the fused results are at most twice as far from float64 ones as eager LoRA's, plus rounding."""

        def results(contestant: Callable[[Tensor], Tensor]) -> list[Tensor]:
            x = self.inputs[0].detach().requires_grad_(self.trains)
            y = contestant(x)
            wanted = (x, self.lora_A, self.lora_B) if self.trains else ()
            return [y, *torch.autograd.grad(y, wanted, self.grad_y)] if self.trains else [y]

        def oracle() -> list[Tensor]:
            inputs = (self.inputs[0], self.lora_A, self.lora_B)
            x, a, b = (t.detach().double().requires_grad_(self.trains) for t in inputs)
            y = F.linear(x, self.weight.double(), self.bias.double()) + F.linear(F.linear(x, a), b) * SCALING
            return [y, *torch.autograd.grad(y, (x, a, b), self.grad_y.double())] if self.trains else [y]

        for fused, eager, exact in zip(results(self.fused), results(self.eager), oracle(), strict=True):
            band = 4 * torch.finfo(fused.dtype).eps * exact.abs().max()
            error, allowed = (fused - exact).abs().max(), 2 * (eager - exact).abs().max() + band
            if not error <= allowed:
                raise SystemExit(f"{self.case}: error {error:.3g} exceeds {allowed:.3g}; nothing was timed")


@dataclass(frozen=True)
class Samples:
    """A case's counted rounds: seconds by contestant in each, and how many rounds were thrown away."""

    counted: list[dict[str, float]]
    discarded: int
    disturbed: bool


def time_case(case: Case, seconds: float, least_rounds: int) -> Samples:
    """Let the contestants take turns for `seconds`, in `least_rounds` rounds at least."""
    layer = Layer(case)
    layer.verify()
    contestants = layer.contestants()
    for contestant in contestants.values():
        layer.run(contestant, 0)
    begin = time.perf_counter()
    layer.run(layer.frozen, 0)
    # A turn lasts at least a few milliseconds, so that the clock and the switch between contestants do not count.
    repeats = max(1, int(3e-3 / (time.perf_counter() - begin)))

    rounds: list[tuple[dict[str, float], bool]] = []
    names = list(contestants)
    started = time.perf_counter()
    while len(rounds) < least_rounds or time.perf_counter() - started < seconds:
        first = len(rounds) % len(names)
        sample = {}
        with ForeignLoad() as load:
            for name in names[first:] + names[:first]:
                begin = time.perf_counter()
                for turn in range(repeats):
                    layer.run(contestants[name], turn)
                sample[name] = (time.perf_counter() - begin) / repeats
        rounds.append((sample, load.share is None or load.share <= MOST_FOREIGN_SHARE))
    quiet = [sample for sample, undisturbed in rounds if undisturbed]
    disturbed = len(quiet) < least_rounds // 2
    counted = [sample for sample, _ in rounds] if disturbed else quiet
    return Samples(counted, len(rounds) - len(counted), disturbed)


def rows_of(case: Case, seconds: float, least_rounds: int) -> Iterator[Row]:
    """Measure a case and describe it."""
    facts = machine()
    samples = time_case(case, seconds, least_rounds)
    for name in samples.counted[0]:
        times = [sample[name] for sample in samples.counted]
        ratios = [sample[name] / sample[FROZEN] for sample in samples.counted]
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        quarters = statistics.quantiles(ratios, n=4, method="inclusive")
        yield Row(
            K=case.K,
            N=case.N,
            M=case.M,
            rank=RANK,
            dtype=case.dtype,
            direction=case.direction,
            contestant=name,
            median_us=round(1e6 * statistics.median(times), 2),
            p20_us=round(1e6 * fifths[0], 2),
            p80_us=round(1e6 * fifths[3], 2),
            ratio=round(quarters[1], 4),
            ratio_p25=round(quarters[0], 4),
            ratio_p75=round(quarters[2], 4),
            rounds=len(samples.counted),
            discarded=samples.discarded,
            disturbed=samples.disturbed,
            threads=torch.get_num_threads(),
            processor=f"{facts['processor']}, {facts['cores']} cores",
            torch=torch.__version__,
            peftkernels=peftkernels.__version__,
            commit=commit(),
            date=date.today().isoformat(),
        )


def commit() -> str:
    """The commit that is measured, marked when the tree has changes, or "unknown" outside a checkout."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def default_path() -> Path:
    """bench/results/<processor and cores>.csv"""
    facts = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{facts['processor']} {os.cpu_count()} cores".lower()).strip("-")
    return Path(__file__).parent / "results" / f"{name}.csv"


def write(rows: list[Row], path: Path) -> None:
    """Write the results beside `path`, then replace it, so that an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora_linear", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="KxN", help=f"default: {' '.join(WIDTHS)}")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M", help="rows of x")
    parser.add_argument("--dtype", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16"))
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long for each case (default: 2)")
    parser.add_argument("--rounds", type=int, default=10, help="at least this many rounds for each case (default: 10)")
    parser.add_argument("--out", type=Path, default=default_path(), help="results file (default: %(default)s)")
    options = parser.parse_args()

    cases = [
        Case(*(int(width) for width in widths.split("x")), M, dtype, direction)
        for dtype in options.dtype
        for direction in options.passes
        for widths in options.widths
        for M in options.tokens
    ]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("measuring", total=len(cases))
        for case in cases:
            measured = list(rows_of(case, options.seconds, options.rounds))
            rows += measured
            ratios = "  ".join(f"{row.contestant} {row.ratio:.2f}" for row in measured if row.contestant != FROZEN)
            place = f"{case.dtype:9}{case.direction:17}{case.K}x{case.N} M={case.M}"
            progress.console.print(f"{place}: {ratios}", soft_wrap=True)
            progress.advance(bar)
    write(rows, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
