"""Strategies on a problem whose right answer is known: the ranks of a planted low-rank target, layer by layer."""

from __future__ import annotations

import pytest
from planted import TRUE_RANKS, Planted, ranks_found

from peftkernels.allocation.strategies import STRATEGIES, GateGradient

BASELINES = ("uniform", "random")
FINDERS = ("adalora", "gate", "knapsack", "magnitude")
# Learns by trying moves between groups of layers, so it is slower; test_bandit.py has the problem it is made for.
BY_TRYING = ("bandit",)
SEEDS = (0, 1, 2)


def test_every_strategy_is_judged() -> None:
    assert sorted(STRATEGIES) == sorted(BASELINES + FINDERS + BY_TRYING)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FINDERS)
def test_finds_the_rank_of_every_layer(name: str, seed: int) -> None:
    assert ranks_found(STRATEGIES[name](), Planted(seed=seed)) == list(TRUE_RANKS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BY_TRYING)
def test_comes_within_one_rank_by_trying(name: str, seed: int) -> None:
    """In twice as many steps. A move is half a rank, and the last decision may see one that is only being tried."""
    found = ranks_found(STRATEGIES[name](), Planted(seed=seed), steps=600)
    assert sum(found) == sum(TRUE_RANKS)
    assert max(abs(rank - true) for rank, true in zip(found, TRUE_RANKS, strict=True)) <= 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_do_not(name: str, seed: int) -> None:
    """They look at nothing that happens in training, so they would find the ranks by luck only."""
    found = ranks_found(STRATEGIES[name](), Planted(seed=seed))
    assert sum(found) == sum(TRUE_RANKS)
    assert max(abs(rank - true) for rank, true in zip(found, TRUE_RANKS, strict=True)) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_alone_comes_within_one_rank(seed: int) -> None:
    """|∂e| says how much a rank wants to change. Of ranks that have become what they should be it vanishes, so which of
    the last ones stays is decided by the noise of batches."""
    found = ranks_found(GateGradient("gradient"), Planted(seed=seed))
    assert max(abs(rank - true) for rank, true in zip(found, TRUE_RANKS, strict=True)) <= 1
    assert sum(found) == sum(TRUE_RANKS)


def test_a_problem_is_the_same_every_time() -> None:
    assert ranks_found(GateGradient("gradient")) == ranks_found(GateGradient("gradient"))
