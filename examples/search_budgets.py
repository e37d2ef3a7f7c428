"""Search for the budget of the demo's AdaLoRA training, with several workers on one storage:

    python -m examples.search_budgets --quick --workers 2 --storage search.log

At the root of the repository, with the demo's packages. Every candidate is one training, judged by texts taken out of
those it could train on. Killed at any time, the same command goes on where it was. Workers on other machines take part
when they are given the same storage (a database's URL) and numbers of their own (--worker). With --front the search
looks for accuracy and few ACTIVE parameters at once, and prints what is worth choosing from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from demo.batches import Encoded, collate, training_order
from demo.compare.trial import carve, prepared_for
from demo.errors import InputError
from demo.options import QUICK_STEPS, QUICK_TOKENS, STEPS, TOKENS, Options
from demo.prepare import Prepared
from demo.runs import Run, with_adapters
from demo.train import accuracy
from peftkernels.allocation import AdaLoraAllocator
from peftkernels.allocation.search import BudgetSearch, BudgetSpace, Candidate, cost_of_ranks
from peftkernels.allocation.search.study import Report
from peftkernels.nn import AdaLoRALinear

GROUPS = {"attention": ["*attention*"], "mlp": ["*intermediate*", "*output.dense"]}
SPACE = BudgetSpace(init_r=(3, 12), target_share=(0.2, 0.7), learning_rate=(1e-3, 3e-2))
REPORTS = 4


class CandidateRun(Run):
    """A training as a candidate says."""

    gated = True

    def __init__(self, prepared: Prepared, candidate: Candidate) -> None:
        classifier = with_adapters(
            prepared.start, lambda linear: AdaLoRALinear.from_linear(linear, candidate.init_r, candidate.lora_alpha)
        )
        assert candidate.learning_rate is not None
        recipe = replace(prepared.start.recipe, adalora_learning_rate=candidate.learning_rate)
        super().__init__("candidate", classifier, classifier, recipe)
        groups = {name: patterns for name, patterns in GROUPS.items() if name in candidate.group_weights}
        self.allocator = AdaLoraAllocator(
            classifier.encoder,
            budget=candidate.budget(groups, prepared.start.adaptable),
            orth_reg_weight=0.1,
            exact_budget=True,
            **candidate.schedule(recipe.steps),
        )
        self.allocator.attach(self.optimizer)

    def add_regularization(self, loss: torch.Tensor) -> torch.Tensor:
        return loss + self.allocator.regularization()

    def active_parameters(self) -> float:
        """What the ACTIVE ranks are made of, in numbers."""
        layers = self.allocator.layers
        costs = {
            name: float(sum(layer.lora_A.shape[1:] + layer.lora_B.shape[:1]) + 1) for name, layer in layers.items()
        }
        return cost_of_ranks(self.allocator.rank_pattern(), costs)


def prepare_for(options: argparse.Namespace) -> tuple[Prepared, Encoded, Encoded]:
    """The demo's texts, model and batches, and its training texts divided: for training, for judging."""
    prepared = prepared_for(
        Options(
            seed=options.seed,
            steps=options.steps or (QUICK_STEPS if options.quick else STEPS),
            batch_size=options.batch_size,
            max_tokens=QUICK_TOKENS if options.quick else TOKENS,
            model=options.model,
            data=options.data,
        )
    )
    return prepared, *carve(prepared.training, options.seed)


def train(
    prepared: Prepared, training: Encoded, held_out: Encoded, candidate: Candidate, report: Report
) -> tuple[CandidateRun, float]:
    """One training and its accuracy on the texts held out, which is told now and then, and at the end."""
    torch.manual_seed(prepared.start.seed)
    run = CandidateRun(prepared, candidate)
    steps = prepared.start.recipe.steps
    order = training_order([len(ids) for ids in training.ids], len(prepared.order[0]), steps, prepared.start.seed)
    for indices in order:
        run.step(collate(training, indices))
        if run.steps_done < steps and run.steps_done % max(1, steps // REPORTS) == 0:
            report(run.steps_done, accuracy(run, held_out))
    reached = accuracy(run, held_out)
    report(steps, reached)
    return run, reached


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps on texts of {QUICK_TOKENS} tokens")
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps of each training (default: {STEPS}, quick {QUICK_STEPS})"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts a step (default 32)")
    parser.add_argument("--trials", type=int, default=20, help="trainings altogether (default 20)")
    parser.add_argument(
        "--storage", default="search.log", help="file or database URL of the search (default search.log)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default 1)")
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, the first of this machine's")
    parser.add_argument("--groups", action="store_true", help="search the budgets of attention and MLP one by one")
    parser.add_argument("--front", action="store_true", help="accuracy against ACTIVE parameters, in place of the best")
    parser.add_argument("--seed", type=int, default=0, help="decides texts, batches and initial values")
    parser.add_argument("--model", type=Path, help="directory of another encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", type=Path, help='JSON Lines of {"text": ..., "label": ...} (default: docstrings)')
    return parser.parse_args(arguments)


def start_others(options: argparse.Namespace, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """The other workers of this machine; each runs this module with a number of its own."""
    numbers = range(options.worker + 1, options.worker + options.workers)
    command = [sys.executable, "-m", "examples.search_budgets", *arguments, "--workers", "1", "--worker"]
    return [subprocess.Popen([*command, str(number)]) for number in numbers]


def search(options: argparse.Namespace) -> BudgetSearch:
    """Take part in the search until it has all its trials."""
    space = replace(SPACE, groups=GROUPS) if options.groups else SPACE
    found = BudgetSearch(
        space,
        storage=options.storage,
        directions=("maximize", "minimize") if options.front else ("maximize",),
        seed=options.seed,
        worker=options.worker,
    )
    prepared, training, held_out = prepare_for(options)

    def objective(candidate: Candidate, report: Report) -> float | tuple[float, ...]:
        run, reached = train(prepared, training, held_out, candidate, report)
        return (reached, run.active_parameters()) if options.front else reached

    found.run(objective, trials=options.trials)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    torch.set_num_threads(max(1, torch.get_num_threads() // max(1, options.workers)))
    others = start_others(options, arguments)
    try:
        found = search(options)
    except InputError as error:
        print(f"search_budgets.py: {error}", file=sys.stderr)
        return 2
    finally:
        codes = [other.wait() for other in others]
    if options.workers > 1 or options.worker == 0:
        chosen = found.front if options.front else [found.best]
        for each in chosen:
            parameters = f", {each.values[1]:,.0f} ACTIVE parameters" if options.front else ""
            print(f"trial {each.number}: validation accuracy {each.values[0]:.3f}{parameters}: {each.candidate}")
    return max([0, *codes])


if __name__ == "__main__":
    sys.exit(main())
