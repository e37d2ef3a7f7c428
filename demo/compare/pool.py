"""Trainings side by side: each in a process of its own with its own threads, its outcome written when it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from demo.checkpoint import write_json
from demo.compare.contestants import Earlier
from demo.compare.options import ComparisonOptions
from demo.compare.settings import Design, Trial
from demo.compare.store import ComparisonStore
from demo.compare.trial import run_trial
from demo.options import Options
from peftkernels.cli.process import prepare_process


def run_trials(
    trials: Sequence[Trial],
    design: Design,
    options: ComparisonOptions,
    store: ComparisonStore,
    advance: Callable[[int], None],
) -> None:
    """Train what the store does not have yet, ``options.jobs`` at a time.

    Every training has ``options.threads`` threads however many there are side by side, so its outcome is the same.

    Args:
        advance: called with the number of trainings that are finished, those of the store included.
    """
    missing = [trial for trial in trials if store.load(trial) is None]
    done = len(trials) - len(missing)
    if done:
        advance(done)
    if options.jobs == 1 or len(missing) < 2:
        before = torch.get_num_threads()
        torch.set_num_threads(options.threads)
        try:
            for number, trial in enumerate(missing, start=done + 1):
                _work(trial, store.earlier(trial.setting), design, options.demo, store.path(trial))
                advance(number)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(options.jobs, len(missing)), context, _begin_worker, (options.threads,))
    try:
        futures = [
            pool.submit(_work, trial, store.earlier(trial.setting), design, options.demo, store.path(trial))
            for trial in missing
        ]
        for number, future in enumerate(as_completed(futures), start=done + 1):
            future.result()
            advance(number)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    prepare_process()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A comparison that is killed leaves no process that trains for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(trial: Trial, earlier: Earlier, design: Design, options: Options, path: Path) -> None:
    write_json(path, run_trial(trial, earlier, options, design.initial_rank, design.orthogonality_weight))
