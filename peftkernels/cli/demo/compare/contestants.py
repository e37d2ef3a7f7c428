"""Who takes part: a row for each contestant. Every strategy of the package has one, and another is added by a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftkernels.allocation.strategies import STRATEGIES, Random, Uniform
from peftkernels.allocation.strategy import Strategy
from peftkernels.cli.demo.compare.budget_run import BudgetRun
from peftkernels.cli.demo.errors import InputError
from peftkernels.cli.demo.runs import Run, Start, build_lora, with_adapters
from peftkernels.nn import AdaLoRALinear

BASELINE = "fixed"
UNIFORM = "uniform"
ALL = "all"


@dataclass(frozen=True)
class Contestant:
    """One way to spend a budget of ranks.

    build     the training at its first step; the start's recipe has the contestant's setting
    budgeted  whether its budget falls during the training, so that delta_t means something to it
    chooses   whether it looks at the training to decide where ranks are: what the comparison is about
    unit      what is equal at the end: "ranks", or "parameters" of the live ranks where costs are the point
    """

    name: str
    build: Callable[[Start], Run]
    budgeted: bool
    chooses: bool
    unit: str = "ranks"


def gated(name: str, strategy: Callable[[Start], Strategy], *, chooses: bool = True, unit: str = "ranks") -> Contestant:
    """A strategy over layers with gates on every adaptable module, with the strategy's defaults."""

    def build(start: Start) -> Run:
        recipe = start.recipe
        classifier = with_adapters(
            start, lambda linear: AdaLoRALinear.from_linear(linear, r=recipe.init_rank, lora_alpha=recipe.adalora_alpha)
        )
        return BudgetRun(name, classifier, recipe, strategy(start), unit)

    return Contestant(name, build, budgeted=True, chooses=chooses, unit=unit)


# What is not simply a strategy with its defaults.
_ROWS = (
    Contestant(BASELINE, build_lora, budgeted=False, chooses=False),
    gated(UNIFORM, lambda start: Uniform(), chooses=False),
    gated("random", lambda start: Random(start.seed), chooses=False),
    # With a budget in ranks, which all cost the same, it would choose as AdaLoRA does.
    gated("knapsack", lambda start: STRATEGIES["knapsack"](), unit="parameters"),
)


def _all_rows() -> dict[str, Contestant]:
    rows = {row.name: row for row in _ROWS}
    own = {name: rows.get(name) or gated(name, _with_defaults(name)) for name in STRATEGIES}
    return {BASELINE: rows[BASELINE], **own}


def _with_defaults(name: str) -> Callable[[Start], Strategy]:
    return lambda start: STRATEGIES[name]()


CONTESTANTS: dict[str, Contestant] = _all_rows()


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """The contestants that the command line names, in the table's order; the baseline always takes part.

    Raises:
        InputError: an unknown name, or none.
    """
    unknown = [name for name in names if name not in CONTESTANTS and name != ALL]
    if unknown or not names:
        found = f"unknown strategy {unknown[0]!r}" if unknown else "no strategy"
        raise InputError(f"--allocators: found {found}; expected all, or some of {', '.join(CONTESTANTS)}")
    return tuple(name for name in CONTESTANTS if ALL in names or name in names or name == BASELINE)
