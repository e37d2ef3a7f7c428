"""The comparison from its options to its files: tune, train, vary, time, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.checkpoint import check_out, write_json
from demo.compare import results
from demo.compare.contestants import choose
from demo.compare.options import ComparisonOptions
from demo.compare.plot import write_plot
from demo.compare.pool import run_trials
from demo.compare.settings import FULL, QUICK, Design, Setting, Trial
from demo.compare.step_times import time_contestants
from demo.compare.store import COMPARISON, ComparisonStore
from demo.compare.table import print_comparison
from demo.compare.trial import prepared_for
from demo.compare.tuning import Tuned, trials_of_tuning, tune, tuning_results
from demo.errors import InputError
from demo.measure import QUICK_ROUNDS, ROUNDS
from demo.prepare import Prepared
from demo.progress import DemoProgress
from demo.report import finite
from peftkernels.cli.machine import machine, versions

PLOT = "comparison.png"
WIDTH_WITHOUT_TERMINAL = 170
_PACKAGES = ("torch", "transformers", "numpy", "matplotlib")
# A timing round of one contestant takes about as long as this share of a training.
_ROUND_WEIGHT = 0.02


def run_comparison(options: ComparisonOptions) -> int:
    """Run or continue the comparison; returns the exit code, 0.

    Raises:
        InputError: an option cannot be used.
    """
    began = time.monotonic()
    names = choose(options.allocators)
    design = QUICK if options.demo.quick else FULL
    seeds = tuple(range(options.demo.seed, options.demo.seed + options.seeds))
    shared = sorted(set(seeds) & set(design.tuning_seeds))
    if shared:
        raise InputError(f"--seed: found the seeds {seeds[0]} to {seeds[-1]}, but {shared[0]} is for tuning alone")
    check_out(options.demo.out)
    console = Console(stderr=True)
    prepared = prepared_for(replace(options.demo, seed=seeds[0]))
    store = ComparisonStore(options.demo.out, _arguments(prepared, design, options))
    note = store.open(resume=options.demo.resume)
    if note is not None:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    comparison = _run(names, design, seeds, prepared, options, store, console)
    comparison["seconds"] = time.monotonic() - began
    out = options.demo.out
    write_plot(out / PLOT, comparison)
    write_json(out / COMPARISON, finite(comparison))
    if options.demo.json:
        print((out / COMPARISON).read_text(), end="")
    else:
        _print(comparison, out)
    return 0


def _run(
    names: tuple[str, ...],
    design: Design,
    seeds: tuple[int, ...],
    prepared: Prepared,
    options: ComparisonOptions,
    store: ComparisonStore,
    console: Console,
) -> dict[str, Any]:
    rounds = QUICK_ROUNDS if options.demo.quick else ROUNDS
    # How many trainings there will be is known before their settings are.
    placeholder = {name: Setting(0.0, 0.0, design.target_rank, design.delta_t) for name in names}
    compared = results.comparison_trials(placeholder, seeds)
    varied = set(results.sensitivity_trials(placeholder, design, seeds)) - set(compared)
    trainings = trials_of_tuning(names, design) + len(compared) + len(varied)
    weight = _ROUND_WEIGHT * len(names)
    with DemoProgress(trainings + weight * rounds, console, "whole comparison") as bars:

        def train(title: str, trials: Sequence[Trial]) -> None:
            bars.begin(title, len(trials), unit="trainings")
            run_trials(list(dict.fromkeys(trials)), design, options, store, bars.advance)
            bars.end()

        tuned = tune(names, design, store, train)
        settings = {name: own.chosen for name, own in tuned.items()}
        compared = results.comparison_trials(settings, seeds)
        train("comparison", compared)
        around = results.sensitivity_trials(settings, design, seeds)
        train("sensitivity", [trial for trial in around if trial not in set(compared)])
        bars.begin("timing", rounds, weight=weight, unit="rounds")
        timing = _timing(settings, design, prepared, rounds, store, bars)
        bars.end()
    return _results(tuned, design, seeds, prepared, store, timing)


def _results(
    tuned: dict[str, Tuned],
    design: Design,
    seeds: tuple[int, ...],
    prepared: Prepared,
    store: ComparisonStore,
    timing: dict[str, Any],
) -> dict[str, Any]:
    settings = {name: own.chosen for name, own in tuned.items()}
    trainings = {
        *(trial for name, own in tuned.items() for trial in own.trials(name, design)),
        *results.comparison_trials(settings, seeds),
        *results.sensitivity_trials(settings, design, seeds),
    }
    finished = [store.finished(trial) for trial in trainings]
    parts = ("training_processor_seconds", "evaluation_processor_seconds")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(_PACKAGES),
        "machine": machine(),
        "arguments": store.arguments,
        "seeds": list(seeds),
        "design": design.as_dict(),
        "data": {
            "labels": list(prepared.labels),
            "training_texts": len(prepared.training),
            "test_texts": len(prepared.test),
            "share_containing_their_label": prepared.named,
        },
        "tuning": tuning_results(tuned, design, store),
        "contestants": results.contestant_results(settings, design, seeds, store, timing),
        "sensitivity": results.sensitivity_results(settings, design, seeds, store),
        "timing": timing,
        "trainings": {
            "count": len(finished),
            "processor_seconds": sum(outcome[part] for outcome in finished for part in parts),
        },
    }


def _arguments(prepared: Prepared, design: Design, options: ComparisonOptions) -> dict[str, Any]:
    """What every training of the directory has in common. Strategies, seeds and grids may grow when resumed."""
    arguments = {name: value for name, value in prepared.arguments.items() if name not in ("--runs", "recipe")}
    recipe = prepared.arguments["recipe"]
    common = ("head_learning_rate", "weight_decay", "warmup_share", "tinit", "tfinal")
    return {
        **arguments,
        "--threads": options.threads,
        "recipe": {name: recipe[name] for name in common},
        "initial_rank": design.initial_rank,
        "orthogonality_weight": design.orthogonality_weight,
    }


def _timing(
    settings: dict[str, Setting],
    design: Design,
    prepared: Prepared,
    rounds: int,
    store: ComparisonStore,
    bars: DemoProgress,
) -> dict[str, Any]:
    """Of an earlier call where it timed the same contestants with the same settings."""
    wanted = {name: setting.as_dict() for name, setting in settings.items()}
    timing = store.load_timing()
    if timing is None or timing["settings"] != wanted:
        timing = {
            **time_contestants(prepared, settings, store.earlier, design, rounds, bars.advance),
            "settings": wanted,
        }
        store.save_timing(timing)
    return timing


def _print(comparison: dict[str, Any], out: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    print_comparison(console, comparison)
    trainings, timing = comparison["trainings"], comparison["timing"]
    console.print(
        f"- {trainings['count']} trainings of {comparison['arguments']['--threads']} thread each took "
        f"{trainings['processor_seconds'] / 60:.0f} minutes of processor time together. Step times: "
        f"{timing['threads']} threads, medians of {timing['rounds']} rounds, ratios within a round.",
        highlight=False,
        markup=False,
    )
    console.print(f"- Written: {out / COMPARISON}, {out / PLOT}.", highlight=False, markup=False)
