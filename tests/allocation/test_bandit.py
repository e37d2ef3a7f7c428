"""The bandit: it must find the useful one of two groups, and go on after a resume as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, ranks_found, train

from peftkernels.allocation import Budget, BudgetAllocator, DecisionLog
from peftkernels.allocation.budget.module_groups import group_modules
from peftkernels.allocation.strategies import AdaLora, Bandit, GroupShares, Uniform

GROUPS = {"useful": ["layers.0", "layers.2"], "useless": ["layers.1", "layers.3"]}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(("rule", "amount"), [("ucb1", 0.05), ("exp3", 0.1)])
def test_the_budget_moves_to_the_group_that_needs_it(rule: str, amount: float, seed: int) -> None:
    """`Uniform` inside the groups: what is learned, the bandit learns from the loss. One rank of the ten may be out at
    the end, when a move that is being tried is what the last decision sees."""
    bandit = Bandit(Uniform(), GROUPS, rule=rule, amount=amount, seed=seed)
    found = ranks_found(bandit, Planted((5, 0, 5, 0), seed=seed), steps=500)
    assert sum(found) == 10
    assert found[0] + found[2] >= 9
    assert bandit.shares["useful"] > 0.85


def test_without_the_bandit_it_does_not() -> None:
    found = ranks_found(GroupShares(Uniform(), GROUPS), Planted((5, 0, 5, 0)), steps=100)
    assert found[0] + found[2] == 5


def allocator_for(problem: Planted, bandit: Bandit) -> BudgetAllocator:
    return BudgetAllocator(
        problem.student, bandit, total_step=80, budget=Budget(9), tinit=5, tfinal=5, exact_budget=True
    )


def started(**options: Any) -> tuple[Planted, Bandit, BudgetAllocator, torch.optim.Optimizer]:
    problem = Planted()
    bandit = Bandit(AdaLora(), interval=3, **options)
    allocator = allocator_for(problem, bandit)
    optimizer = torch.optim.AdamW(problem.parameters, lr=2e-2)
    allocator.attach(optimizer)
    return problem, bandit, allocator, optimizer


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", ["exp3", "ucb1"])
@pytest.mark.parametrize("cut", [20, 31])
def test_a_resumed_run_ends_with_the_same_bits(rule: str, cut: int) -> None:
    problem, bandit, allocator, optimizer = started(rule=rule)
    saved: dict[str, Any] = {}

    def save(step: int, loss: float) -> None:
        if step == cut:
            model = {name: tensor.clone() for name, tensor in problem.student.state_dict().items()}
            moments = {
                key: {n: v.clone() for n, v in own.items()} for key, own in optimizer.state_dict()["state"].items()
            }
            saved.update(model=model, allocator=allocator.state_dict(), moments=moments)

    train(problem, allocator, optimizer, 80, each=save)
    expected = allocator.state_dict()
    assert bandit.shares != dict.fromkeys(bandit.labels, 0.25)

    problem, _, allocator, optimizer = started(rule=rule)
    problem.student.load_state_dict(saved["model"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["moments"]})
    allocator.load_state_dict(saved["allocator"])
    for number, (x, target) in enumerate(problem.batches(80), 1):
        if number > cut:
            loss = (problem.student(x) - target).square().mean()
            loss.backward()
            allocator.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert same(allocator.state_dict(), expected)


def test_a_rollback_takes_the_draws_back_too() -> None:
    problem, bandit, allocator, optimizer = started()
    train(problem, allocator, optimizer, 30)
    token = allocator.snapshot()
    before = bandit.shares
    train(problem, allocator, optimizer, 20)
    after, state = bandit.shares, allocator.state_dict()
    assert after != before
    allocator.rollback(token)
    assert bandit.shares == before
    train(problem, allocator, optimizer, 20)
    assert bandit.shares == after
    # The metadata counts the rollback.
    again = allocator.state_dict()
    assert same({**again, "metadata": state["metadata"]}, state)


class Log:
    def __init__(self) -> None:
        self.moves: list[dict[str, Any]] = []

    def on_start(self, facts: Any) -> None:
        assert facts["strategy"] == "bandit"

    def on_decision(self, *args: Any) -> None:
        pass

    def on_event(self, step: int, kind: str, details: Any) -> None:
        if kind == "moved":
            self.moves.append({"step": step, **details})


def test_moves_are_told_and_add_up() -> None:
    problem, bandit, allocator, optimizer = started()
    log = Log()
    allocator.add_observer(log)
    train(problem, allocator, optimizer, 75)
    assert len(log.moves) > 5
    shares = dict.fromkeys(bandit.labels, 0.25)
    for move in log.moves:
        # No round before the first mask, and none after the last allocation.
        assert 5 < move["step"] < 75
        shares[move["from"]] -= move["share"]
        shares[move["to"]] += move["share"]
        assert move["shares"] == pytest.approx(shares)
        assert min(move["shares"].values()) > 0.0099
    assert bandit.shares == pytest.approx(shares)


def test_the_decision_log_has_the_moves(tmp_path: Path) -> None:
    problem, _, allocator, optimizer = started()
    log = DecisionLog(tmp_path / "log.jsonl")
    allocator.add_observer(log)
    train(problem, allocator, optimizer, 40)
    log.close()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    moves = [event for event in events if event["event"] == "moved"]
    assert moves
    assert all(move["from"] != move["to"] and move["share"] >= 0 for move in moves)


def test_a_step_without_a_loss_is_refused() -> None:
    problem, _, allocator, optimizer = started()
    x, target = next(problem.batches(1))
    (problem.student(x) - target).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"call allocator\.observe\(loss\)"):
        optimizer.step()
    assert allocator.steps == 0


@pytest.mark.parametrize(("shares", "expected"), [((0.5, 0.5), 4), ((0.75, 0.25), 6), ((0.99, 0.01), 7)])
def test_a_group_gets_ranks_in_proportion_to_its_share(shares: tuple[float, float], expected: int) -> None:
    """Eight ranks for two groups of seven: what the first cannot use falls to the second."""
    problem = Planted((0, 0), initial_ranks=(7, 7))
    strategy = GroupShares(Uniform())
    allocator = BudgetAllocator(problem.student, strategy, total_step=2, budget=Budget(8), exact_budget=True)
    strategy.move(1, 0, shares[0] - 0.5)
    keep, _ = allocator.statistics.select(strategy.scores(allocator.statistics), 2)
    first, second = keep.split([7, 7])
    assert (int(first.sum()), int(second.sum())) == (expected, 8 - expected)


def test_groups_by_projection_type_by_depth_and_by_name() -> None:
    names = [f"encoder.{layer}.{kind}" for layer in range(3) for kind in ("query", "dense")]
    assert group_modules(names) == {"query": (0, 2, 4), "dense": (1, 3, 5)}
    assert group_modules([f"layers.{layer}" for layer in range(8)]) == {
        "modules 0-1": (0, 1),
        "modules 2-3": (2, 3),
        "modules 4-5": (4, 5),
        "modules 6-7": (6, 7),
    }
    assert group_modules(names, {"last": "encoder.2.*", "others": "*"}) == {"last": (4, 5), "others": (0, 1, 2, 3)}
    with pytest.raises(ValueError, match=r"found none for 'encoder\.0\.query'"):
        group_modules(names, {"last": "encoder.2.*"})
    with pytest.raises(ValueError, match=r"groups\['none'\]: found no module"):
        group_modules(names, {"all": "*", "none": "x"})
    with pytest.raises(ValueError, match="found 1, expected at least two"):
        group_modules(["single"])


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"rule": "thompson"}, "rule: found 'thompson'"),
        ({"interval": 0}, "interval: found 0"),
        ({"amount": 1.0}, r"amount: found 1\.0"),
        ({"gamma": 0.0}, r"gamma: found 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Bandit(AdaLora(), **options)
