"""Who takes part: a row for each contestant. Every strategy of the package has one, and another is added by a row."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from demo.compare.budget_run import BudgetRun, Policy
from demo.compare.search_space import SEARCHES, OuterSearch
from demo.errors import InputError
from demo.model import TextClassifier
from demo.runs import Run, Start, build_lora, with_adapters
from peftkernels.allocation.layers.gated import find_gated_layers
from peftkernels.allocation.policies.freezing import LayerFreezing
from peftkernels.allocation.policies.learning_rate import LearningRateScale
from peftkernels.allocation.search import Candidate
from peftkernels.allocation.strategies import STRATEGIES, AdaLora, Prior, Random, Uniform
from peftkernels.allocation.strategies.rank_prior import RankPrior
from peftkernels.allocation.strategies.strategy import Strategy
from peftkernels.nn import AdaLoRALinear

BASELINE = "fixed"
UNIFORM = "uniform"
ALL = "all"


@dataclass(frozen=True)
class Earlier:
    """What trainings before have found, for those contestants that start from it.

    Attributes:
        ranks: ACTIVE ranks by module at the end of an earlier training.
        candidate: what a search over budgets chose.
    """

    ranks: Mapping[str, int] | None = None
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to spend a budget of ranks.

    Attributes:
        build: the training at its first step; the start's recipe has the contestant's setting.
        budgeted: True if its budget falls during the training, so that delta_t means something to it.
        chooses: True if it looks at the training to decide where ranks are: what the comparison is about.
        unit: what is equal at the end: "ranks", or "parameters" of the ACTIVE ranks where costs are the point.
        learns_from: the contestant whose best training of the tuning it takes the final ranks of.
        search: the search that tunes it, in place of the grid.
        freezes: True if it may take whole modules out of the training.
    """

    name: str
    build: Callable[[Start, Earlier], Run]
    budgeted: bool = True
    chooses: bool = True
    unit: str = "ranks"
    learns_from: str | None = None
    search: OuterSearch | None = None
    freezes: bool = False


def adaptable_with_gates(start: Start) -> TextClassifier:
    """The starting model with gated adapters on every adaptable module."""
    recipe = start.recipe
    return with_adapters(
        start, lambda linear: AdaLoRALinear.from_linear(linear, r=recipe.init_rank, lora_alpha=recipe.adalora_alpha)
    )


def gated(
    name: str,
    strategy: Callable[[Start], Strategy],
    *,
    chooses: bool = True,
    unit: str = "ranks",
    policy: Callable[[], Policy] | None = None,
    freezes: bool = False,
) -> Contestant:
    """A strategy over layers with gates on every adaptable module, and maybe a policy, with their defaults."""

    def build(start: Start, earlier: Earlier) -> Run:
        policies = () if policy is None else (policy(),)
        return BudgetRun(name, adaptable_with_gates(start), start.recipe, strategy(start), unit=unit, policies=policies)

    return Contestant(name, build, chooses=chooses, unit=unit, freezes=freezes)


def with_prior(name: str, learns_from: str) -> Contestant:
    """AdaLoRA that starts from the ranks that an earlier training ended with."""

    def build(start: Start, earlier: Earlier) -> Run:
        if earlier.ranks is None:
            raise ValueError(f"{name}: found no ranks of an earlier training, expected those of {learns_from}")
        classifier = adaptable_with_gates(start)
        prior = RankPrior.from_ranks(find_gated_layers(classifier.encoder), earlier.ranks)
        return BudgetRun(name, classifier, start.recipe, Prior(AdaLora(), prior))

    return Contestant(name, build, learns_from=learns_from)


def searched(name: str, search: OuterSearch) -> Contestant:
    """AdaLoRA with the schedule and the groups' budgets that a search over whole trainings chose."""

    def build(start: Start, earlier: Earlier) -> Run:
        if earlier.candidate is None:
            raise ValueError(f"{name}: found no candidate, expected what the search chose")
        return BudgetRun(name, adaptable_with_gates(start), start.recipe, AdaLora(), candidate=earlier.candidate)

    return Contestant(name, build, search=search)


# What is not simply a strategy with its defaults.
_ROWS = (
    Contestant(BASELINE, lambda start, earlier: build_lora(start), budgeted=False, chooses=False),
    gated(UNIFORM, lambda start: Uniform(), chooses=False),
    gated("random", lambda start: Random(start.seed), chooses=False),
    # With a budget in ranks, which all cost the same, it would choose as AdaLoRA does.
    gated("knapsack", lambda start: STRATEGIES["knapsack"](), unit="parameters"),
)
# AdaLoRA with something around it.
_AROUND = (
    with_prior("prior", AdaLora.name),
    gated("freezing", lambda start: AdaLora(), policy=LayerFreezing, freezes=True),
    gated("rate-scale", lambda start: AdaLora(), policy=LearningRateScale),
    *(searched(name, search) for name, search in SEARCHES.items()),
)


def _all_rows() -> dict[str, Contestant]:
    rows = {row.name: row for row in _ROWS}
    own = {name: rows.get(name) or gated(name, _with_defaults(name)) for name in STRATEGIES}
    return {BASELINE: rows[BASELINE], **own, **{row.name: row for row in _AROUND}}


def _with_defaults(name: str) -> Callable[[Start], Strategy]:
    return lambda start: STRATEGIES[name]()


CONTESTANTS: dict[str, Contestant] = _all_rows()


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """The contestants that the command line names, in the table's order; the baseline always takes part, and those
    that others learn from.

    Raises:
        InputError: an unknown name, or none, or one that needs a package that is not installed.
    """
    unknown = [name for name in names if name not in CONTESTANTS and name != ALL]
    if unknown or not names:
        found = f"unknown strategy {unknown[0]!r}" if unknown else "no strategy"
        raise InputError(f"--allocators: found {found}; expected all, or some of {', '.join(CONTESTANTS)}")
    teachers = {CONTESTANTS[name].learns_from for name in names if name != ALL}
    wanted = {BASELINE, *names, *teachers}
    chosen = tuple(name for name in CONTESTANTS if ALL in names or name in wanted)
    searches = [name for name in chosen if CONTESTANTS[name].search is not None]
    if searches and importlib.util.find_spec("optuna") is None:
        raise InputError(
            f"--allocators: {searches[0]} needs Optuna, which is not installed; pip install 'peftkernels[search]'"
        )
    return chosen
