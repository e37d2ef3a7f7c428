"""The demo's AdaLoRA training on several processes, each with its part of every batch:

    torchrun --standalone --nproc-per-node 2 -m examples.train_torchrun --quick

At the root of the repository, with the demo's packages. Every process holds the whole model; DistributedDataParallel
averages the gradients, of live ranks only (`live_rank_hook`), and after every step the processes compare what they
decided.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from demo.batches import Encoded, collate
from demo.errors import InputError
from demo.options import QUICK_STEPS, QUICK_TOKENS, STEPS, TOKENS, Options
from demo.prepare import Prepared, prepare
from demo.runs import AdaLoraRun, build_adalora
from demo.train import accuracy
from peftkernels.distributed import DivergenceCheck, LiveRanks, check_agreement, live_rank_hook


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps on texts of {QUICK_TOKENS} tokens")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS}, quick {QUICK_STEPS})")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a batch, over all processes together")
    parser.add_argument("--seed", type=int, default=0, help="decides texts, batches and initial values")
    parser.add_argument("--model", type=Path, help="directory of another encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", type=Path, help='JSON Lines of {"text": ..., "label": ...} (default: docstrings)')
    return parser.parse_args(arguments)


def read(arguments: argparse.Namespace, processes: int) -> Prepared:
    """Texts, model and batches: from the same seed the same on every process."""
    if arguments.batch_size < 1 or arguments.batch_size % processes:
        # Unequal parts would make the mean of the processes' losses another one than the batch's.
        raise InputError(f"--batch-size: found {arguments.batch_size}, expected a multiple of {processes} processes")
    options = Options(
        seed=arguments.seed,
        steps=arguments.steps or (QUICK_STEPS if arguments.quick else STEPS),
        batch_size=arguments.batch_size,
        max_tokens=QUICK_TOKENS if arguments.quick else TOKENS,
        model=arguments.model,
        data=arguments.data,
    )
    return prepare(options, ("adalora",))


def train(run: AdaLoraRun, prepared: Prepared, process: int, processes: int) -> None:
    """All steps, each process on every so many-th text of each batch."""
    model = DistributedDataParallel(run.model)
    model.register_comm_hook(LiveRanks(run.allocator), live_rank_hook)
    run.model = model
    run.allocator.add_callback(DivergenceCheck(every=1))
    for indices in prepared.order:
        loss, _ = run.step(collate(prepared.training, indices[process::processes]))
        if process == 0 and run.steps_done % max(1, len(prepared.order) // 10) == 0:
            kept = sum(map(sum, run.ranks().values()))
            print(f"step {run.steps_done}: loss {float(loss):.3f}, {kept} ranks kept", flush=True)
    run.model = model.module


def test_accuracy(run: AdaLoraRun, test: Encoded, process: int, processes: int) -> float:
    """Share of all test texts that are classified rightly; each process looks at its part of them."""
    own = Encoded(test.ids[process::processes], test.classes[process::processes], test.pad_id)
    right = torch.tensor(accuracy(run, own) * len(own), dtype=torch.float64)
    dist.all_reduce(right)
    return round(float(right)) / len(test)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    process, processes = dist.get_rank(), dist.get_world_size()
    try:
        began = time.monotonic()
        prepared = read(options, processes)
        run = build_adalora(prepared.start)
        train(run, prepared, process, processes)
        share = test_accuracy(run, prepared.test, process, processes)
        check_agreement(run.allocator)
        if process == 0:
            patterns = run.ranks().values()
            print(
                f"{processes} processes, {run.steps_done} steps of {options.batch_size} texts, "
                f"{time.monotonic() - began:.0f} s: test accuracy {share:.3f}, "
                f"{sum(map(sum, patterns))} of {sum(map(len, patterns))} ranks kept; "
                f"masks, gates and scores agree on all processes"
            )
    except InputError as error:
        if process == 0:
            print(f"train_torchrun.py: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
