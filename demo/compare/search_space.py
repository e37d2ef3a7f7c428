"""The searches over whole trainings that take part: what they may choose, and by what they choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from demo.compare.settings import Design
from peftkernels.allocation.budget.budgets import Group
from peftkernels.allocation.search import BudgetSpace

GROUPS: dict[str, Sequence[str]] = {"attention": ["*attention*"], "mlp": ["*intermediate*", "*output.dense"]}
PHASES = {"tinit": (0.0, 0.3), "tfinal": (0.1, 0.5)}


@dataclass(frozen=True)
class OuterSearch:
    """A search that tunes a contestant: the sampler of `BudgetSearch`, and whether few ACTIVE ranks count too.

    Attributes:
        for_few: False: highest validation accuracy at the comparison's target. True: also the target is searched, with
            few parameters in ACTIVE ranks as the second objective, and there is a front of best trade-offs.
    """

    sampler: str
    for_few: bool

    @property
    def directions(self) -> tuple[str, ...]:
        """Of `BudgetSearch`."""
        return ("maximize", "minimize") if self.for_few else ("maximize",)

    def space(self, design: Design) -> BudgetSpace:
        """What the grid ranges over and, beyond it, phases of the schedule, ΔT and the budgets of two groups."""
        targets = (min(design.target_ranks), max(design.target_ranks)) if self.for_few else (design.target_rank,) * 2
        return BudgetSpace(
            init_r=design.initial_rank,
            target_share=(targets[0] / design.initial_rank, targets[1] / design.initial_rank),
            alpha_per_rank=(min(design.scales), max(design.scales)),
            learning_rate=(min(design.learning_rates), max(design.learning_rates)),
            deltaT=design.delta_ts,
            groups=GROUPS,
            **PHASES,
        )


SEARCHES = {"search": OuterSearch("tpe", for_few=False), "pareto": OuterSearch("nsga2", for_few=True)}


def groups_in(modules: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Those of the groups that a model has modules of; one of another architecture may have none."""
    return {
        name: patterns for name, patterns in GROUPS.items() if any(Group(patterns, 1).has(module) for module in modules)
    }
