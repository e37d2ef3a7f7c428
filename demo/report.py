"""The demo's figures: one dictionary for results.json, one table for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.recipe import PEFT_RUNS, TITLES
from demo.timing import FROZEN, Timing
from demo.train import Record

AGREEMENT_STEPS = 20
MOST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class RunFigures:
    """One row of the table; None where a figure does not apply.

    Attributes:
        live_ranks: ACTIVE ranks of all adapted matrices at the end of the training.
        total_ranks: all their ranks.
        saved_bytes: kept for backward by one forward pass on the largest batch of the training.
    """

    name: str
    accuracy: float | None
    milliseconds: float
    ratio: float
    ratio_p25: float
    ratio_p75: float
    live_ranks: int | None
    total_ranks: int | None
    trainable_parameters: int
    saved_bytes: int


@dataclass(frozen=True)
class Agreement:
    """peftkernels beside peft from the same start.

    Attributes:
        loss_difference: largest relative difference of cross-entropy and differentiated loss over the first steps.
        steps: how many steps that is.
        same_masks: ranks whose final state (kept, masked) is the same.
        all_masks: of how many.
    """

    ours: str
    peft: str
    loss_difference: float
    steps: int
    same_masks: int
    all_masks: int

    @property
    def holds(self) -> bool:
        """True if the losses agree within 1e-3; False when one is not finite."""
        return self.loss_difference <= MOST_DIFFERENCE


def agreements(records: dict[str, Record]) -> list[Agreement]:
    """One for each pair of runs that were trained on both libraries."""
    found = []
    for theirs in PEFT_RUNS:
        ours = theirs.removeprefix("peft-")
        if ours in records and theirs in records:
            a, b = records[ours], records[theirs]
            difference = max(
                _relative_difference(a.losses, b.losses), _relative_difference(a.total_losses, b.total_losses)
            )
            pairs = [
                kept == other for name, mask in a.masks.items() for kept, other in zip(mask, b.masks[name], strict=True)
            ]
            steps = min(AGREEMENT_STEPS, len(a.losses))
            found.append(Agreement(ours, theirs, difference, steps, sum(pairs), len(pairs)))
    return found


def _relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    pairs = list(zip(ours, theirs, strict=True))[:AGREEMENT_STEPS]
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    return max(differences) if all(math.isfinite(d) for d in differences) else math.inf


def finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def run_results(figures: RunFigures, record: Record | None) -> dict[str, Any]:
    """A row of the table with, for a training, its curves and final masks."""
    results = asdict(figures)
    if record is not None:
        results["losses"] = record.losses
        results["total_losses"] = record.total_losses
        results["training_loop_milliseconds"] = record.milliseconds
        results["modules"] = record.modules
        results["live_ranks_by_step"] = record.live_ranks
        results["masks"] = record.masks
    return results


def print_table(console: Console, rows: Sequence[RunFigures], *, title: str) -> None:
    """One row a run; the frozen model first."""
    table = Table(title=title, title_justify="left")
    table.add_column("run")
    for column in ("test\naccuracy", "ms per\nstep", "× frozen\nstep", "ranks\nACTIVE / all", "trainable\nparameters"):
        table.add_column(column, justify="right")
    table.add_column("saved for\nbackward", justify="right")
    for row in rows:
        table.add_row(
            "frozen, forward + backward" if row.name == FROZEN else TITLES[row.name],
            "" if row.accuracy is None else f"{row.accuracy:.3f}",
            f"{row.milliseconds:.0f}" if row.milliseconds >= 100 else f"{row.milliseconds:.1f}",
            f"{row.ratio:.2f}" if row.name == FROZEN else f"{row.ratio:.2f} ({row.ratio_p25:.2f}–{row.ratio_p75:.2f})",
            "" if row.total_ranks is None else f"{row.live_ranks} / {row.total_ranks}",
            f"{row.trainable_parameters:,}",
            f"{row.saved_bytes / 1e6:.1f} MB",
        )
    console.print(table)


def timing_note(timing: Timing) -> str:
    """How the step times were measured, in words."""
    note = (
        f"Step times: medians of {timing.rounds} rounds in which all variants take turns on the same batch, of average "
        f"size (about {timing.tokens:.0f} tokens); ratios are taken within a round, with quartiles."
    )
    if not timing.measured:
        return note + " This system does not tell what other processes used, so no round could be left out for that."
    if timing.disturbed:
        return note + " Other processes used the machine in nearly every round, so all rounds count."
    return note + f" {timing.discarded} rounds in which other processes used over 6 % of the machine are left out."


def peer_ratios(timing: Timing) -> dict[str, float]:
    """For each run on both libraries: median over the rounds of peft's step time by peftkernels'."""
    pairs = [(theirs.removeprefix("peft-"), theirs) for theirs in PEFT_RUNS]
    return {
        ours: statistics.median(b / a for a, b in zip(timing.samples[ours], timing.samples[theirs], strict=True))
        for ours, theirs in pairs
        if ours in timing.samples and theirs in timing.samples
    }


def peer_note(ratios: dict[str, float]) -> str:
    """The ratios in words."""
    parts = [f"{ratio:.2f} times as long for {TITLES[ours].split(',')[0]}" for ours, ratio in ratios.items()]
    return f"On peft a step takes {' and '.join(parts)} (median of the rounds' ratios)."


def accuracy_note(test_documents: int, labels: int, named: float) -> str:
    """What an accuracy is worth."""
    error = math.sqrt(0.75 * 0.25 / test_documents)
    return (
        f"Accuracy on {test_documents} held-out texts, {labels} labels; one standard error near 0.75 is {error:.3f}. "
        f"{named:.0%} of the texts contain their label as a word."
    )


def agreement_note(agreement: Agreement) -> str:
    """What to say of how alike the two libraries trained."""
    verdict = "agree" if agreement.holds else "DO NOT AGREE"
    masks = ""
    if agreement.ours == "adalora":
        masks = f"; {agreement.same_masks} of {agreement.all_masks} ranks end in the same state"
    return (
        f"{TITLES[agreement.ours]} and peft {verdict}: largest relative difference of the loss over the first "
        f"{agreement.steps} steps {agreement.loss_difference:.1e} (at most {MOST_DIFFERENCE:.0e}){masks}."
    )
