"""Scores that overflow, gradients that are not finite from the start, and scores that are all the same."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from small_models import adapter_layers, draw_gradients
from torch import Tensor

from peftkernels.allocation import Budget, BudgetAllocator, Group, Strategy
from peftkernels.allocation.strategies import (
    AdaLora,
    Bandit,
    GateGradient,
    Knapsack,
    Magnitude,
    Uniform,
)
from peftkernels.allocation.strategies.group_shares import GroupShares
from peftkernels.backends.registry import allocation_names, kernels_for
from peftkernels.nn import AdaLoRALinear

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "adalora": AdaLora,
    "gate": GateGradient,
    "gate, gradient": lambda: GateGradient("gradient"),
    "knapsack": lambda: Knapsack(AdaLora()),
    "shares": lambda: GroupShares(AdaLora(), {"first": "layer0", "other": "layer[12]"}),
    "magnitude": Magnitude,
    "uniform": Uniform,
    "bandit": lambda: Bandit(AdaLora(), {"first": "layer0", "other": "layer[12]"}),
}
SHAPES = ((8, 9), (10, 9), (9, 8))


class Given(Strategy):
    """Scores that a test writes."""

    name = "given"
    capturable = True

    def begin(self, statistics: object) -> None:
        self.values = torch.zeros(18)

    def scores(self, statistics: object) -> Tensor:
        return self.values


def fill(layers: dict[str, AdaLoRALinear], value: float) -> None:
    draw_gradients(layers)
    for layer in layers.values():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_E):
            assert parameter.grad is not None
            parameter.grad.mul_(0).add_(value) if value != value else parameter.grad.mul_(value)


def kept(allocator: BudgetAllocator) -> list[int]:
    return [sum(own) for own in allocator.rank_pattern().values()]


def run(allocator: BudgetAllocator, layers: dict[str, AdaLoRALinear], value: float, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            fill(layers, value)
            allocator.observe(1.0)
            allocator.step()


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_from_the_first_step_on(strategy: str, exact_budget: bool, value: float) -> None:
    layers = adapter_layers(*SHAPES)
    gates = [layer.lora_E.detach().clone() for layer in layers.values()]
    allocator = BudgetAllocator(
        layers, STRATEGIES[strategy](), total_step=9, tfinal=2, target_r=2, exact_budget=exact_budget
    )
    run(allocator, layers, value if value != value else 1e39, 9)
    assert kept(allocator) == [6, 6, 6]
    assert allocator.nonfinite_steps == 6
    assert allocator.undecided_steps == 7
    assert allocator.explain().undecided_steps == 7
    assert "7 steps were to choose ranks and could not" in str(allocator.explain())
    for layer, before in zip(layers.values(), gates, strict=True):
        assert torch.equal(layer.lora_E, before)


@pytest.mark.parametrize("impl", allocation_names())
@pytest.mark.parametrize("capturable", [False, True])
def test_finite_gradients_whose_scores_overflow(impl: str, capturable: bool) -> None:
    layers = adapter_layers(*SHAPES)
    try:
        kernels_for(torch.device("cpu"), torch.float32, impl)
    except RuntimeError as error:
        pytest.skip(str(error))
    allocator = BudgetAllocator(layers, AdaLora(), total_step=9, tfinal=2, target_r=2, impl=impl, capturable=capturable)
    run(allocator, layers, 1e30, 9)
    assert kept(allocator) == [6, 6, 6]
    assert allocator.nonfinite_steps == 0
    assert allocator.undecided_steps == 7
    assert all(layer.lora_E.all() for layer in layers.values())


def test_it_is_warned_about_once_and_told_every_time() -> None:
    layers = adapter_layers(*SHAPES)
    allocator = BudgetAllocator(layers, AdaLora(), total_step=9, tfinal=2, target_r=2)
    told = []

    class Listener:
        def on_start(self, facts: object) -> None: ...
        def on_decision(self, *facts: object) -> None:
            raise AssertionError("nothing was decided")

        def on_event(self, step: int, kind: str, details: dict[str, str]) -> None:
            told.append((step, kind, details["why"]))

    allocator.add_observer(Listener())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            fill(layers, 1e30)
            allocator.step()
    (once,) = caught
    assert "not finite or all the same: the mask before stays" in str(once.message)
    assert told[0] == (1, "skipped", "the scores at step 1 are not finite or all the same; the mask before stays")
    assert [step for step, _, _ in told] == [1, 2, 3, 4]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_ranks_without_a_score_stay_as_they_are_and_the_others_are_chosen(value: float, capturable: bool) -> None:
    layers = adapter_layers(*SHAPES)
    strategy = Given()
    allocator = BudgetAllocator(
        layers, strategy, total_step=20, tfinal=2, target_r=3, capturable=capturable, exact_budget=True
    )
    strategy.values.copy_(torch.arange(18.0))
    for _ in range(8):
        draw_gradients(layers)
        allocator.step()
    before = torch.tensor(list(itertools.chain(*allocator.rank_pattern().values())))
    strategy.values[[0, 17]] = value
    assert before.tolist()[0] is False
    assert before.tolist()[17] is True
    strategy.values[1:17] = torch.arange(16.0, 0.0, -1)
    draw_gradients(layers)
    allocator.step()
    after = torch.tensor(list(itertools.chain(*allocator.rank_pattern().values())))
    budget = int(allocator.budget(9))
    # Rank 17 takes one of the budget, rank 0 none: the first of the others have the highest scores now.
    assert after.tolist() == [False, *([True] * (budget - 1)), *([False] * (17 - budget)), True]
    assert allocator.undecided_steps == 0


def test_a_group_without_scores_does_not_hold_up_the_others() -> None:
    layers = adapter_layers(*SHAPES)
    groups = {"first": Group("layer0", 2), "others": Group("layer[12]", 5)}
    strategy = Given()
    allocator = BudgetAllocator(layers, strategy, budget=Budget(groups=groups), total_step=8, tfinal=2)
    strategy.values[6:] = torch.arange(12.0)
    run(allocator, layers, 1.0, 8)
    assert kept(allocator)[0] == 6
    assert sum(kept(allocator)[1:]) == 5
    assert allocator.undecided_steps == 6
    assert allocator.decision is not None


def test_the_count_and_what_it_follows_from_survive_a_resume() -> None:
    def made() -> tuple[dict[str, AdaLoRALinear], BudgetAllocator]:
        torch.manual_seed(0)
        layers = adapter_layers(*SHAPES)
        return layers, BudgetAllocator(layers, AdaLora(), total_step=9, tfinal=2, target_r=2, exact_budget=True)

    layers, allocator = made()
    run(allocator, layers, float("nan"), 3)
    others, resumed = made()
    resumed.load_state_dict(allocator.state_dict())
    assert resumed.undecided_steps == 3
    for own, one in ((layers, allocator), (others, resumed)):
        run(one, own, float("nan"), 1)
        assert one.undecided_steps == 4
        torch.manual_seed(7)
        run(one, own, 1e-2, 5)
    assert allocator.rank_pattern() == resumed.rank_pattern()
    assert sum(kept(allocator)) == 6


def test_a_state_saved_before_there_was_such_a_count_is_read() -> None:
    from peftkernels.allocation.run.json_tensor import METADATA, decode, encode

    layers = adapter_layers(*SHAPES)
    allocator = BudgetAllocator(layers, AdaLora(), total_step=9, tfinal=2, target_r=2)
    run(allocator, layers, 1e-2, 2)
    state = allocator.state_dict()
    facts = decode(state)
    del facts["undecided_steps"], facts["informed"]
    allocator.load_state_dict({**state, METADATA: encode(facts)})
    assert allocator.undecided_steps == 0
    assert allocator.informed


def test_squares_of_large_gradients_are_scores() -> None:
    layers = adapter_layers(*SHAPES)
    allocator = BudgetAllocator(layers, GateGradient(), total_step=9, tfinal=2, target_r=2)
    draw_gradients(layers)
    for index, layer in enumerate(layers.values()):
        assert layer.lora_E.grad is not None
        layer.lora_E.grad.fill_(1e30 if index == 1 else 1.0)
    for _ in range(9):
        allocator.step()
    assert allocator.nonfinite_steps == 0
    assert torch.isfinite(allocator.statistics.gates).all()
    assert kept(allocator)[1] == 6


def _by_hand(scores: list[float], before: list[bool], budget: int, exact: bool) -> tuple[list[bool], bool]:
    """The rule in plain Python: which ranks stay, and whether anything was decided."""
    usable = [index for index, score in enumerate(scores) if abs(score) < float("inf")]
    held = sum(keep for index, keep in enumerate(before) if index not in usable)
    room = max(0, budget - held)
    order = sorted(usable, key=lambda index: (-scores[index], index))
    chosen = order[:room]
    if not exact and len(order) > room:
        chosen = [index for index in chosen if scores[index] > scores[order[room]]]
    if not usable or (not chosen and budget >= 1):
        return before, False
    return [index in chosen if index in usable else keep for index, keep in enumerate(before)], True


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_random_mixtures_follow_the_rule(exact: bool, capturable: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 3e38, float("inf"), float("nan"), -1.0])
    layers = adapter_layers(*SHAPES)
    strategy = Given()
    allocator = BudgetAllocator(
        layers, strategy, total_step=63, tfinal=2, target_r=1, exact_budget=exact, capturable=capturable
    )
    before, undecided = [True] * 18, 0
    for step in range(1, 62):
        few = values[torch.randperm(9, generator=generator)[: int(torch.randint(1, 10, (), generator=generator))]]
        strategy.values.copy_(few[torch.randint(len(few), (18,), generator=generator)])
        draw_gradients(layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            allocator.step()
        expected, decided = _by_hand(strategy.values.tolist(), before, int(allocator.budget(step)), exact)
        found = list(itertools.chain(*allocator.rank_pattern().values()))
        assert found == expected, (step, strategy.values, before)
        before, undecided = found, undecided + (not decided)
        assert allocator.undecided_steps == undecided
    assert undecided
