"""An allocator's last decision in a form that can be read and logged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModuleAllocation:
    """What happened to the ranks of one layer.

    Attributes:
        name: Its module path.
        kept: One bool per rank.
        scores: The score of each rank at the last decision; empty before the first.
        threshold: Scores at or below it were masked; None before the first decision.
        why: The decision in words.
    """

    name: str
    kept: tuple[bool, ...]
    scores: tuple[float, ...]
    threshold: float | None
    why: str

    @property
    def n_kept(self) -> int:
        """How many of its ranks are kept."""
        return sum(self.kept)

    @property
    def score(self) -> float | None:
        """The sum of the layer's rank scores."""
        return sum(self.scores) if self.scores else None

    @property
    def margin(self) -> float | None:
        """The smallest distance of a rank's score from the threshold: how near the layer is to another decision."""
        if self.threshold is None or not self.scores:
            return None
        return min(abs(score - self.threshold) for score in self.scores)


@dataclass(frozen=True)
class AllocationReport:
    """The state of an allocation after optimizer step `step`.

    Attributes:
        step: The optimizer step.
        phase: Where in the schedule it is, in words.
        budget: What the schedule allows at `step`, in `unit`.
        unit: What the budget counts.
        decided_at: The step of the last decision, None before the first.
        threshold: The threshold of that decision; None before the first, and where groups have budgets of their own:
            `modules` has the one of each.
        nonfinite_steps: Steps whose gradients were not finite and left the score averages unchanged.
        skipped_steps: Calls of the optimizer that a GradScaler kept from stepping.
        modules: The layers, in model order.
        rollbacks: How often the run was rolled back.
        undecided_steps: Steps that were to choose ranks and had no score to choose by.
    """

    step: int
    phase: str
    budget: float
    unit: str
    decided_at: int | None
    threshold: float | None
    nonfinite_steps: int
    skipped_steps: int
    modules: tuple[ModuleAllocation, ...] = field(repr=False)
    rollbacks: int = 0
    undecided_steps: int = 0

    @property
    def n_kept(self) -> int:
        """How many ranks are kept."""
        return sum(module.n_kept for module in self.modules)

    @property
    def n_total(self) -> int:
        """How many ranks there are."""
        return sum(len(module.kept) for module in self.modules)

    def __str__(self) -> str:
        decided = "no decision yet" if self.decided_at is None else f"decided at step {self.decided_at}"
        budget = f"{self.budget:g}" if self.unit == "ranks" else f"{self.budget:g} {self.unit}"
        lines = [
            f"step {self.step} ({self.phase}): {self.n_kept} of {self.n_total} ranks kept, budget {budget}, "
            f"threshold {_number(self.threshold)}, {decided}"
        ]
        if self.skipped_steps:
            lines.append(f"the gradient scaler skipped {self.skipped_steps} optimizer steps, which count as none")
        if self.nonfinite_steps:
            lines.append(
                f"{self.nonfinite_steps} steps had gradients that were not finite and left the scores as they were"
            )
        if self.undecided_steps:
            lines.append(
                f"{self.undecided_steps} steps were to choose ranks and could not: no score was finite, or all were "
                "the same; the mask before stayed"
            )
        if self.rollbacks:
            lines.append(f"the run was rolled back {self.rollbacks} times")
        rows = [("module", "kept", "score", "margin", "why")]
        for module in self.modules:
            kept = f"{module.n_kept}/{len(module.kept)}"
            rows.append((module.name, kept, _number(module.score), _number(module.margin), module.why))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines += [
            "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[4]]) for row in rows
        ]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
