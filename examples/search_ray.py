"""The search of search_budgets.py with Ray Tune, for those who have a Ray cluster: Tune places the trainings.

    pip install 'peftkernels[demo,search]' 'ray[tune]'
    python examples/search_ray.py --quick --trials 8 --at-once 2

Tune's Optuna searcher draws from a space that is a function of a trial, which is what `BudgetSpace.draw` is; from the
parameters that Tune hands to a training, `BudgetSpace.candidate` makes the candidate again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.search.optuna import OptunaSearch

HERE = str(Path(__file__).resolve().parent)


def training(config: dict[str, Any], options: argparse.Namespace) -> None:
    """One training in a process of Ray's, told to Tune as it goes on."""
    sys.path.insert(0, HERE)
    from search_budgets import SPACE, prepare_for, train

    torch.set_num_threads(1)
    prepared, texts, held_out = prepare_for(options)

    def report(step: int, value: float) -> None:
        tune.report({"accuracy": value, "step": step})

    train(prepared, texts, held_out, SPACE.candidate(config), report)


def draw(trial: Any) -> None:
    sys.path.insert(0, HERE)
    from search_budgets import SPACE

    SPACE.draw(trial)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps on short texts")
    parser.add_argument("--steps", type=int, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=32, help="texts a step (default 32)")
    parser.add_argument("--trials", type=int, default=20, help="trainings altogether (default 20)")
    parser.add_argument("--at-once", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="decides texts, batches and initial values")
    parser.add_argument("--model", type=Path, help="directory of another encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", type=Path, help='JSON Lines of {"text": ..., "label": ...} (default: docstrings)')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    tuner = tune.Tuner(
        tune.with_parameters(training, options=options),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(draw, metric="accuracy", mode="max", seed=options.seed),
            num_samples=options.trials,
            max_concurrent_trials=options.at_once,
        ),
    )
    results = tuner.fit()
    best = results.get_best_result("accuracy", "max")
    sys.path.insert(0, HERE)
    from search_budgets import SPACE

    print(f"validation accuracy {best.metrics['accuracy']:.3f}: {SPACE.candidate(best.config)}")
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
