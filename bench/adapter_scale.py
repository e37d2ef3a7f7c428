"""``python -m bench.adapter_scale``: which scale and learning rate AdaLoRA needs where LoRA's are known.

Trains every point of `grid()` on the demo's task, one file a run, so that a killed command goes on where it was; then
writes `bench/results/adapter-scale-<machine>.json`, `docs/pictures/adapter-scale.png` and the tables of
`docs/learning-rate-and-scale.md`. Settings were chosen by accuracy on a validation part of the training texts; the test
texts are looked at for those settings only that were trained with more than one seed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import adapter_scale_report as report
from bench.adapter_run import Point, Task, evaluate_weights, load_task, train_point
from bench.report import PICTURES, RESULTS, ROOT, ReportError
from bench.results import file_name
from demo.checkpoint import write_json
from demo.errors import InputError
from demo.options import Options
from peftkernels._files import write_atomically, write_text
from peftkernels.cli.machine import machine, versions

STEPS = 112
DOCS = ROOT / "docs" / "learning-rate-and-scale.md"
RUNS = Path("peftkernels-bench-adapter-scale")
# HF peft's default alpha of 8 over its default initial rank of 12.
PEFT_SCALE = 8 / 12


def lora(lr: float, scale: float = 2.0, rank: int = 8) -> Point:
    """LoRA of a fixed rank."""
    return Point(rank, None, lr, scale)


def adalora(lr: float, scale: float, orth: float = 0.1, ranks: tuple[int, int] = (12, 8), gate_lr: float = 1) -> Point:
    """AdaLoRA, or its layers at a fixed rank where both ranks are the same."""
    return Point(ranks[0], ranks[1], lr, scale, orth, gate_lr)


def grid() -> list[Point]:
    """All trainings, the most informative first."""
    rule, peft_term = adalora(5e-3, 4.0), adalora(5e-3, 4.0, 0.5)
    alone = [
        lora(1e-3),
        adalora(1e-3, PEFT_SCALE, 0.5),
        rule,
        adalora(1e-3, 2.0),
        adalora(3e-3, 2.0),
        lora(3e-3),
        adalora(1e-3, 32.0),
        adalora(1e-3, 8.0),
        adalora(3e-3, 8.0),
        adalora(5e-3, 8.0),
        peft_term,
        adalora(1e-3, 2.0, ranks=(8, 8)),
        lora(1e-3, rank=2),
        adalora(5e-3, 4.0, 0.5, (4, 2)),
    ]
    again = [(1, lora(1e-3)), (1, rule), (2, rule), (2, lora(1e-3)), (1, adalora(1e-3, 2.0)), (1, peft_term)]
    return [*alone, *(replace(point, seed=seed) for seed, point in again)]


def train_all(
    points: Sequence[Point], folder: Path, task_of: Callable[[int], Task], say: Callable[[str], None]
) -> None:
    """Train the points that have no file in `folder` yet; a run's file appears when the run is finished."""
    for number, point in enumerate(points, start=1):
        if (folder / f"{point.key}.json").exists():
            continue
        began = time.monotonic()
        result, weights = train_point(point, task_of(point.seed))
        result["seconds"] = time.monotonic() - began
        write_atomically(folder / f"{point.key}.pt", partial(torch.save, weights))
        write_json(folder / f"{point.key}.json", result)
        accuracy = result["validation"]["accuracy"]
        say(f"{number}/{len(points)} {point.key}: validation {accuracy:.3f}, {result['seconds']:.0f} s")


def test_chosen(points: Sequence[Point], folder: Path, task_of: Callable[[int], Task]) -> None:
    """Evaluate on the test texts the settings that were trained with more than one seed."""
    seeds = {point.seed for point in points}
    for point in points:
        if sum(replace(point, seed=seed) in points for seed in seeds) < 2:
            continue
        path = folder / f"{point.key}.json"
        result = json.loads(path.read_text())
        if "test" not in result:
            weights = torch.load(folder / f"{point.key}.pt", weights_only=True)
            write_json(path, {**result, "test": evaluate_weights(point, task_of(point.seed), weights)})


def collect(points: Sequence[Point], folder: Path) -> dict[str, Any]:
    """The runs of all points without their losses, and what they were measured on; numbers to five digits."""
    runs = [json.loads((folder / f"{point.key}.json").read_text()) for point in points]
    for run in runs:
        del run["losses"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {key: value for key, value in machine().items() if key != "system"},
        "versions": versions(["torch", "transformers"]),
        "runs": [_rounded(run) for run in runs],
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """One run a line."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1)[:-2]
    runs = ",\n".join("  " + json.dumps(run, allow_nan=False) for run in results["runs"])
    write_text(path, f'{head},\n "runs": [\n{runs}\n ]\n}}\n')


def check_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """Keep what the runs in `folder` are trained on; raises InputError where they were trained on something else."""
    path = folder / "arguments.json"
    if not path.exists():
        write_json(path, arguments)
        return
    before = json.loads(path.read_text())
    for name, value in arguments.items():
        if before.get(name) != value:
            raise InputError(
                f"{name}: found {value!r}, but the runs in {folder} were trained with {before.get(name)!r}"
            )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapter_scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"one file a run; default: {RUNS}")
    parser.add_argument("--only", default="", metavar="REGEX", help="points whose key matches; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--plots", type=Path, default=ROOT / PICTURES, metavar="DIR", help=f"default: {PICTURES}")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FILE", help=f"default: docs/{DOCS.name}")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each training; default: {STEPS}")
    parser.add_argument("--model", type=Path, metavar="DIR", help="another encoder, as for python -m demo")
    parser.add_argument("--data", type=Path, metavar="FILE", help="other texts, as for python -m demo")
    options = parser.parse_args(arguments)
    points = [point for point in grid() if re.search(options.only, point.key)]
    if not points:
        parser.error(f"--only: no point matches {options.only!r}")
    tasks: dict[int, Task] = {}

    def task_of(seed: int) -> Task:
        if seed not in tasks:
            tasks[seed] = load_task(Options(seed=seed, steps=options.steps, model=options.model, data=options.data))
        return tasks[seed]

    say = Console(stderr=True, highlight=False, markup=False).print
    inputs = {"--steps": options.steps, "--model": str(options.model or ""), "--data": str(options.data or "")}
    try:
        check_arguments(options.runs, inputs)
        train_all(points, options.runs, task_of, say)
        test_chosen(points, options.runs, task_of)
        results = collect(points, options.runs)
        path = options.results / f"adapter-scale-{Path(file_name()).stem}.json"
        write_results(path, results)
        report.write(results, options.plots / "adapter-scale.png", options.docs)
    except (InputError, ReportError) as error:
        print(f"adapter_scale: error: {error}", file=sys.stderr)
        return 2
    say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
