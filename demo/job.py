"""The demo from its options to its files: train, time, compare, report."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from demo import report
from demo.batches import collate, evaluation_order
from demo.builders import build
from demo.checkpoint import Store, check_out, write_json
from demo.export import export_adapters
from demo.measure import QUICK_ROUNDS, ROUNDS, measure
from demo.model import quiet_transformers
from demo.options import Options
from demo.prepare import MINILM, Prepared, choose_runs, prepare
from demo.progress import DemoProgress
from demo.recipe import ADAPTIVE_RUNS, TITLES
from demo.results import Outcome, print_outcome, results
from demo.runs import AdaLoraRun, build_adalora
from demo.train import Record, train
from peftkernels.cli.report.collect import RESULTS
from peftkernels.cli.report.heatmap import write_heatmap

HEATMAP = "live-ranks.png"
# A timing round takes about as long as this many training steps.
STEPS_PER_ROUND = 5.0


def run_demo(options: Options) -> int:
    """Run the demo; returns the exit code: 0, or 1 when peftkernels and peft do not agree.

    Raises:
        InputError: an option cannot be used.
    """
    began = time.monotonic()
    console = Console(stderr=True)
    quiet_transformers()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_out(options.out)
    runs, note = choose_runs(options)
    _say(console, note)
    prepared = prepare(options, runs)
    store = Store(options.out, prepared.arguments)
    _say(console, store.open(resume=options.resume))
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    with DemoProgress(len(prepared.order) * len(runs) + STEPS_PER_ROUND * rounds, console) as progress:
        records = {name: _train_one(name, prepared, store, progress) for name in runs}
        progress.begin("timing", rounds, weight=STEPS_PER_ROUND, unit="rounds")
        timing, rows = measure(prepared, records, rounds, progress.advance)
        progress.end()
    order = evaluation_order([len(ids) for ids in prepared.test.ids], 32)
    batch = collate(prepared.test, order[len(order) // 2])
    outcome = Outcome(
        prepared=prepared,
        records=records,
        timing=timing,
        rows=rows,
        agreements=report.agreements(records),
        exports=export_adapters(prepared, records, batch, options.out),
        heatmap=_draw(prepared, records, options),
        seconds=time.monotonic() - began,
    )
    write_json(options.out / RESULTS, report.finite(results(outcome)))
    if options.json:
        print((options.out / RESULTS).read_text(), end="")
    else:
        print_outcome(outcome, options.out)
    return 0 if outcome.holds else 1


def _say(console: Console, note: str | None) -> None:
    if note is not None:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _train_one(name: str, prepared: Prepared, store: Store, progress: DemoProgress) -> Record:
    progress.begin(TITLES[name], len(prepared.order))
    finished = store.load_finished(name)
    if finished is not None:
        record = Record.of(finished, store.finished_path(name))
    else:
        torch.manual_seed(prepared.start.seed)
        record = train(
            build(name, prepared.start),
            prepared.order,
            prepared.training,
            prepared.test,
            store,
            lambda done, loss: progress.advance(done, f"loss {loss:.3f}"),
        )
    progress.end()
    return record


def _draw(prepared: Prepared, records: dict[str, Record], options: Options) -> Path | None:
    """The picture of the adaptive run, on peftkernels where that was trained; None without an adaptive run."""
    name = next((name for name in ADAPTIVE_RUNS if name in records), None)
    if name is None:
        return None
    record, recipe = records[name], prepared.start.recipe
    run: AdaLoraRun = build_adalora(prepared.start)
    encoder = (MINILM if options.model is None else str(options.model.resolve())).rsplit("/", 1)[-1]
    total = sum(len(mask) for mask in record.masks.values())
    kept = sum(sum(mask) for mask in record.masks.values())
    path = options.out / HEATMAP
    write_heatmap(
        path,
        record.modules,
        record.live_ranks,
        most=recipe.init_rank,
        title=f"{TITLES[name]}: ACTIVE ranks of {encoder}, {total} → {kept} in {len(record.modules)} matrices",
        budget=[int(run.allocator.budget(step)) for step in range(1, recipe.steps + 1)],
        schedule=(recipe.tinit, recipe.steps - recipe.tfinal),
    )
    return path
