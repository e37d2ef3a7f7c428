"""The Gymnasium environment over rank budgets."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from planted import Planted

from peftkernels.allocation import Budget, BudgetAllocator, Strategy
from peftkernels.allocation.strategies import Uniform

pytest.importorskip("gymnasium", reason="the environment needs gymnasium")
from gymnasium.utils.env_checker import check_env

from peftkernels.allocation.search.environment import RankBudgetEnv

GROUPS = {"useful": ["layers.0", "layers.2"], "useless": ["layers.1", "layers.3"]}


def fine_tuning(strategy: Strategy, seed: int, steps: int = 60) -> Iterator[float]:
    """A planted target of a seed of its own: two layers to learn, two to leave alone."""
    problem = Planted((5, 0, 5, 0), seed=seed % 1000)
    allocator = BudgetAllocator(
        problem.student, strategy, total_step=steps, budget=Budget(problem.total), tinit=5, tfinal=5, exact_budget=True
    )
    optimizer = torch.optim.AdamW(problem.parameters, lr=5e-2, weight_decay=0.0)
    allocator.attach(optimizer)
    for x, target in problem.batches(steps):
        loss = (problem.student(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def environment(**options) -> RankBudgetEnv:
    return RankBudgetEnv(fine_tuning, GROUPS, inner=Uniform, **options)


def test_gymnasiums_own_check_passes() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(environment(), skip_render_check=True)
    told = [str(warning.message) for warning in found if issubclass(warning.category, UserWarning)]
    assert told == []


def test_spaces_follow_the_groups() -> None:
    env = environment()
    assert env.labels == ["useful", "useless"]
    assert env.arms == [None, (0, 1), (1, 0)]
    assert env.action_space.n == 3
    assert env.observation_space.shape == (8,)
    assert RankBudgetEnv(fine_tuning, inner=Uniform).action_space.n == 13


def play(env: RankBudgetEnv, action: int) -> tuple[list[float], float, torch.Tensor]:
    env.reset(seed=7)
    rewards, over, info, observation = [], False, {}, None
    while not over:
        observation, reward, over, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert not truncated
        rewards.append(reward)
    return rewards, info["loss"], torch.from_numpy(observation)


def test_giving_to_the_useful_group_is_rewarded() -> None:
    env = environment()
    useful, useless = env.arms.index((1, 0)), env.arms.index((0, 1))
    good, good_loss, seen = play(env, useful)
    bad, bad_loss, _ = play(env, useless)
    assert good_loss < bad_loss
    assert sum(good) > sum(bad)
    # A round of five steps after the first, until sixty are over; then one that finds none left.
    assert len(good) == 12
    assert seen[:2].tolist() == pytest.approx([0.99, 0.01])
    assert seen[2:4].tolist() == pytest.approx([10 / 12, 0.0])


def test_the_same_seed_is_the_same_episode() -> None:
    env = environment()
    assert play(env, 1)[0] == play(environment(), 1)[0]
    first, _ = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    other, _ = env.reset(seed=4)
    assert (first == again).all()
    assert (first != other).any()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="fine_tuning: found str"):
        RankBudgetEnv("run")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interval: found 0"):
        environment(interval=0)
    with pytest.raises(RuntimeError, match="it ended before its first round"):
        RankBudgetEnv(lambda strategy, seed: iter(()))
    with pytest.raises(RuntimeError, match="it gave the strategy to no allocator"):
        RankBudgetEnv(lambda strategy, seed: iter([1.0]))
    env = environment()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: found 3, expected an int from 0 to 2"):
        env.step(3)


def test_the_package_does_not_import_gymnasium_and_says_what_is_missing() -> None:
    code = (
        "import sys, peftkernels.allocation.strategies\n"
        "assert 'gymnasium' not in sys.modules\n"
        "sys.modules['gymnasium'] = None\n"
        "import peftkernels.allocation.search.environment"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the environment needs gymnasium: pip install 'peftkernels[rl]'" in done.stderr
