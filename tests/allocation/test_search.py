"""The outer loop: what it may choose, what it finds, and what survives when a worker is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.search import BudgetSearch, BudgetSpace, Candidate, Pruned, cost_of_ranks
from peftkernels.allocation.strategies import Uniform
from peftkernels.nn import AdaLoRALinear

SPACE = BudgetSpace(init_r=(2, 16), target_share=(0.1, 0.9), deltaT=(1, 5, 10))


def _hill(candidate: Candidate, report: Any) -> float:
    """Highest at init_r = 8, target_r = 4, tinit = 0.15, deltaT = 5."""
    return -(
        abs(candidate.init_r - 8) / 8
        + abs(candidate.target_r - 4) / 4
        + abs(candidate.tinit - 0.15)
        + (candidate.deltaT != 5) * 0.2
    )


def _choices(search: BudgetSearch) -> list[tuple[Candidate, tuple[float, ...]]]:
    return [(finished.candidate, finished.values) for finished in search.finished]


@pytest.mark.parametrize(("sampler", "trials", "seeds"), [("tpe", 35, (0, 1000)), ("gp", 25, (0,))])
def test_it_climbs_a_hill_that_random_choice_does_not(sampler: str, trials: int, seeds: tuple[int, ...]) -> None:
    learned, drawn = [], []
    for seed in seeds:
        for values, name in ((learned, sampler), (drawn, "random")):
            search = BudgetSearch(SPACE, sampler=name, seed=seed)
            search.run(_hill, trials=trials)
            values.append(search.best.values[0])
    assert sum(learned) > sum(drawn)
    assert max(learned) > -0.3


def test_a_search_that_was_interrupted_makes_the_same_choices(tmp_path: Path) -> None:
    whole = BudgetSearch(SPACE, seed=3)
    whole.run(_hill, trials=16)
    for _ in range(4):
        part = BudgetSearch(SPACE, storage=tmp_path / "search.log", seed=3)
        part.run(_hill, trials=len(part.finished) + 4)
    assert _choices(part) == _choices(whole)
    assert part.best == whole.best


def test_an_objective_that_raises_is_tried_again(tmp_path: Path) -> None:
    seen: list[Candidate] = []

    def failing(candidate: Candidate, report: Any) -> float:
        seen.append(candidate)
        raise RuntimeError("out of memory")

    search = BudgetSearch(SPACE, storage=tmp_path / "search.log")
    with pytest.raises(RuntimeError, match="out of memory"):
        search.run(failing, trials=3)
    again = BudgetSearch(SPACE, storage=tmp_path / "search.log")
    tried: list[Candidate] = []
    again.run(lambda candidate, report: tried.append(candidate) or 0.0, trials=3)  # type: ignore[func-returns-value]
    assert tried[0] == seen[0]
    assert len(tried) == 3


_WORKER = """
import sys, time
from peftkernels.allocation.search import BudgetSearch, BudgetSpace
def objective(candidate, report):
    print(candidate.init_r, flush=True)
    time.sleep(float(sys.argv[3]))
    return -abs(candidate.init_r - 8)
search = BudgetSearch(BudgetSpace(init_r=(2, 16)), storage=sys.argv[1], worker=int(sys.argv[2]))
search.run(objective, trials=8)
"""


def _start_worker(storage: Path, worker: int, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _WORKER, str(storage), str(worker), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_killed_workers_trial_is_taken_up(tmp_path: Path) -> None:
    storage = tmp_path / "search.log"
    worker = _start_worker(storage, 0, 60)
    assert worker.stdout is not None
    tried = int(worker.stdout.readline())
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(30)
    search = BudgetSearch(BudgetSpace(init_r=(2, 16)), storage=storage)
    first: list[int] = []
    search.run(lambda candidate, report: first.append(candidate.init_r) or 0.0, trials=2)  # type: ignore[func-returns-value]
    assert first[0] == tried
    assert len(search.finished) == 2
    assert [trial.state.name for trial in search.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_workers_share_a_storage(tmp_path: Path) -> None:
    storage = tmp_path / "search.log"
    processes = [_start_worker(storage, worker, 0.2) for worker in (0, 1)]
    done = [len(process.communicate(timeout=120)[0].split()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    search = BudgetSearch(BudgetSpace(init_r=(2, 16)), storage=storage)
    # Two that look at the same time may each start what they take for the last trial.
    assert 8 <= len(search.finished) == sum(done) <= 9
    assert min(done) >= 1


def test_a_candidate_is_trained_once() -> None:
    """What a sampler draws again has its values already."""
    trained: list[Candidate] = []

    def objective(candidate: Candidate, report: Any) -> tuple[float, float]:
        trained.append(candidate)
        return float(candidate.deltaT), float(candidate.init_r)

    space = BudgetSpace(init_r=(2, 3), target_share=0.5, alpha_per_rank=1.0, tinit=0.1, tfinal=0.1, deltaT=(1, 5))
    search = BudgetSearch(space, directions=("maximize", "minimize"))
    search.run(objective, trials=20)
    assert len(search.finished) == 20
    assert len(trained) == len(set(map(repr, trained))) <= 4
    assert [finished.values for finished in search.front] == [(5.0, 2.0)]


def test_hopeless_candidates_are_pruned() -> None:
    steps = []

    def objective(candidate: Candidate, report: Any) -> float:
        final = _hill(candidate, report)
        for step in range(10):
            steps.append(step)
            report(step, final * (step + 1))
        return final

    search = BudgetSearch(SPACE, seed=1)
    search.run(objective, trials=30)
    states = [trial.state.name for trial in search.study.trials]
    assert states.count("PRUNED") >= 5
    assert states[:5] == ["COMPLETE"] * 5
    assert len(steps) < 300
    assert len(search.finished) == states.count("COMPLETE")


def test_pruned_can_be_raised_by_the_objective() -> None:
    def objective(candidate: Candidate, report: Any) -> float:
        if candidate.init_r < 8:
            raise Pruned("too small")
        return float(candidate.init_r)

    search = BudgetSearch(SPACE, seed=0, sampler="random")
    search.run(objective, trials=12)
    assert search.best.candidate.init_r >= 8
    assert len(search.finished) < 12


def test_the_front_holds_what_nothing_beats() -> None:
    """Accuracy 1 - 1/r against cost r: every rank is on the front, a wasted init_r is not."""

    def objective(candidate: Candidate, report: Any) -> tuple[float, float]:
        wasted = 0.1 * abs(candidate.tinit - 0.15)
        return 1 - 1 / candidate.target_r - wasted, float(candidate.target_r)

    space = BudgetSpace(init_r=8, target_share=(0.1, 0.9))
    search = BudgetSearch(space, directions=("maximize", "minimize"), seed=0)
    search.run(objective, trials=120)
    front = search.front
    ranks = [finished.candidate.target_r for finished in front]
    assert ranks == sorted(set(ranks), reverse=True)
    assert {1, 7} <= set(ranks) and len(ranks) >= 5
    for one in front:
        for other in search.finished:
            assert not (other.values[0] > one.values[0] and other.values[1] <= one.values[1])
    with pytest.raises(ValueError, match="several directions"):
        _ = search.best


def test_the_useful_group_gets_the_budget() -> None:
    """A teacher that differs from the student in one of two layers: the search gives that layer the ranks."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False))
    change = torch.randn(12, 4) @ torch.randn(4, 12) / 4
    x = torch.randn(64, 12)
    with torch.no_grad():
        target = torch.tanh(x @ base[0].weight.T) @ (base[1].weight + change).T
    groups = {"first": ["0"], "second": ["2"]}
    space = BudgetSpace(
        init_r=6, target_share=0.34, alpha_per_rank=4.0, tinit=0.1, tfinal=0.4, deltaT=(1,), groups=groups
    )

    def objective(candidate: Candidate, report: Any) -> float:
        torch.manual_seed(1)
        first, second = (AdaLoRALinear.from_linear(own, candidate.init_r, candidate.lora_alpha) for own in base)
        model = nn.Sequential(first, nn.Tanh(), second)
        budget = candidate.budget(groups, ["0", "2"])
        allocator = BudgetAllocator(model, Uniform(), budget=budget, exact_budget=True, **candidate.schedule(60))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        allocator.attach(optimizer)
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sum(map(sum, allocator.rank_pattern().values())) == 4
        return -loss.item()

    search = BudgetSearch(space, seed=0)
    search.run(objective, trials=16)
    best = search.best.candidate.budget(groups, ["0", "2"])
    assert best.groups["second"].total == 3 and best.groups["first"].total == 1
    worst = min(search.finished, key=lambda finished: finished.values)
    assert worst.candidate.budget(groups, ["0", "2"]).groups["second"].total < 3


def test_budgets_of_candidates() -> None:
    layers = [f"layer.{i}.{kind}" for i in range(3) for kind in ("attention", "mlp")]
    groups = {"attention": ["*.attention"]}
    candidate = Candidate(8, 16.0, 2, 0.1, 0.3, 5, group_weights={"attention": 3.0})
    budget = candidate.budget(groups, layers)
    assert (budget.groups["attention"].total, budget.total) == (9, 3)
    assert Candidate(8, 16.0, 2, 0.1, 0.3, 5).budget({}, layers).total == 12
    # A group cannot get more than its ranks: the others get the rest.
    greedy = Candidate(3, 6.0, 2, 0.1, 0.3, 5, group_weights={"attention": 1e9})
    budget = greedy.budget(groups, layers)
    assert (budget.groups["attention"].total, budget.total) == (8, 4)
    assert candidate.schedule(100) == {"total_step": 100, "tinit": 10, "tfinal": 30, "deltaT": 5}
    for steps in range(4, 30):
        extreme = Candidate(8, 16.0, 2, 1.0, 1.0, 5).schedule(steps)
        assert extreme["tinit"] < extreme["total_step"] - extreme["tfinal"] >= 2
    assert cost_of_ranks({"a": [True, False], "b": [True, True]}, {"a": 2.0, "b": 0.5}) == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetSpace(init_r=(8, 4)), r"init_r: found \(8, 4\)"),
        (lambda: BudgetSpace(init_r=1), "init_r: found 1"),
        (lambda: BudgetSpace(target_share=1.5), "target_share: found 1.5"),
        (lambda: BudgetSpace(deltaT=()), r"deltaT: found \(\)"),
        (lambda: BudgetSearch(SPACE, directions=()), r"directions: found \(\)"),
        (lambda: BudgetSearch(SPACE, sampler="best"), "sampler: found 'best', expected one of tpe, gp, nsga2, random"),
        (
            lambda: BudgetSearch(SPACE, sampler="gp", directions=("maximize", "minimize")),
            "sampler: found 'gp' with several",
        ),
        (lambda: BudgetSearch(SPACE).run(_hill, trials=0), "trials: found 0"),
        (lambda: Candidate(8, 16.0, 2, 0.1, 0.3, 5).schedule(3), "total_step: found 3"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stored_search_keeps_its_directions(tmp_path: Path) -> None:
    BudgetSearch(SPACE, storage=tmp_path / "search.log")
    with pytest.raises(ValueError, match="expected those of the stored search"):
        BudgetSearch(SPACE, storage=tmp_path / "search.log", directions=("minimize",))


def test_without_optuna_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['optuna'] = None\n"
        "from peftkernels.allocation.search import BudgetSearch, BudgetSpace\n"
        "try: BudgetSearch(BudgetSpace())\n"
        "except ImportError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'peftkernels[search]'" in printed


def test_a_loop_of_its_own_asks_and_tells() -> None:
    """Several at a time; the same seed chooses the same, and the front is made of what was told."""
    searches = [BudgetSearch(SPACE, directions=("maximize", "minimize"), seed=3) for _ in range(2)]
    for _ in range(2):
        asked = [search.ask(3) for search in searches]
        assert asked[0] == asked[1] and len({each.number for each in asked[0]}) == 3
        for search in searches:
            for each in asked[0]:
                search.tell(each.number, _hill(each.candidate, None), each.candidate.target_r)
    first = searches[0]
    assert [each.number for each in first.finished] == list(range(6))
    assert {each.values for each in first.front} <= {each.values for each in first.finished}
    assert first.front[0].values[0] == max(each.values[0] for each in first.finished)
    (open_one,) = first.ask()
    with pytest.raises(ValueError, match="values: found 1, expected 2, one for each direction"):
        first.tell(open_one.number, 1.0)
    with pytest.raises(ValueError, match="count: found 0, expected a whole number"):
        first.ask(0)
