"""The outcome of the demo: as the content of results.json, and printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from demo import report
from demo.export import Export
from demo.prepare import Prepared
from demo.report import Agreement, RunFigures
from demo.timing import Timing
from demo.train import Record
from peftkernels.backends.registry import backend_status
from peftkernels.cli.machine import PACKAGES, machine, versions
from peftkernels.cli.report.collect import DECISIONS, RESULTS, RUNS

WIDTH_WITHOUT_TERMINAL = 120


@dataclass(frozen=True)
class Outcome:
    """All that the demo found out."""

    prepared: Prepared
    records: dict[str, Record]
    timing: Timing
    rows: list[RunFigures]
    agreements: list[Agreement]
    exports: list[Export]
    heatmap: Path | None
    seconds: float

    @property
    def holds(self) -> bool:
        """True if the losses agree with peft's and peft computes the same with the saved adapters."""
        return all(a.holds for a in self.agreements) and all(e.holds for e in self.exports)


def results(outcome: Outcome) -> dict[str, Any]:
    """The content of results.json."""
    prepared, timing = outcome.prepared, outcome.timing
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": outcome.seconds,
        "versions": versions(PACKAGES),
        "machine": machine(),
        "arguments": prepared.arguments,
        "data": {
            "labels": list(prepared.labels),
            "training_texts": len(prepared.training),
            "test_texts": len(prepared.test),
            "share_containing_their_label": prepared.named,
        },
        "runs": {row.name: report.run_results(row, outcome.records.get(row.name)) for row in outcome.rows},
        "timing": {
            "rounds": timing.rounds,
            "discarded": timing.discarded,
            "disturbed": timing.disturbed,
            "foreign_load_measured": timing.measured,
            "tokens_per_step": timing.tokens,
            "milliseconds": timing.samples,
            "peft_by_peftkernels": report.peer_ratios(timing),
        },
        "agreement": [{**asdict(agreement), "holds": agreement.holds} for agreement in outcome.agreements],
        "adapters": [
            {**asdict(export), "directory": str(export.directory), "holds": export.holds} for export in outcome.exports
        ],
        "pack_cache": pack_cache(),
    }


def pack_cache() -> dict[str, Any] | None:
    """Figures of the packed copies of frozen weights, None where the C++ kernels cannot run."""
    if backend_status()["cpu"] is not None:
        return None
    from peftkernels.backends.cpu import pack_cache_stats

    return dict(pack_cache_stats())


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Table and notes on standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    prepared = outcome.prepared
    recipe = prepared.start.recipe
    title = (
        f"{prepared.model_name.rsplit('/', 1)[-1]}, {len(prepared.training)} texts, {len(prepared.labels)} labels, "
        f"{recipe.steps} steps of {len(prepared.order[0])}, {torch.get_num_threads()} threads, float32"
    )
    report.print_table(console, outcome.rows, title=title)
    notes = [report.accuracy_note(len(prepared.test), len(prepared.labels), prepared.named)]
    notes.append(report.timing_note(outcome.timing))
    ratios = report.peer_ratios(outcome.timing)
    if ratios:
        notes.append(report.peer_note(ratios))
    notes.extend(report.agreement_note(agreement) for agreement in outcome.agreements)
    notes.extend(_export_note(export) for export in outcome.exports)
    packed = pack_cache()
    if packed is not None:
        notes.append(
            f"Packed copies of the frozen weights, shared by the runs on peftkernels: {packed['bytes'] / 1e6:.0f} MB."
        )
    if any((out / RUNS).glob(f"*/{DECISIONS}")):
        notes.append(f"What was decided about ranks, and why: peftkernels report {out}")
    files = [out / RESULTS] if outcome.heatmap is None else [out / RESULTS, outcome.heatmap]
    notes.append(f"Written: {', '.join(map(str, files))}. The demo took {outcome.seconds:.0f} s.")
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)


def _export_note(export: Export) -> str:
    if export.difference is None:
        return f"Adapter for HF peft: {export.directory} (peft is not installed, so loading it was not tried)."
    verdict = "the same logits" if export.holds else "OTHER LOGITS"
    return (
        f"Adapter {export.directory}: loaded by HF peft it gives {verdict}, "
        f"largest difference {export.difference:.1e} at logits up to {export.largest_logit:.1f}."
    )
