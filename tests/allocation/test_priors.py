"""Priors: what one planted model teaches about another of twice the depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted import TRUE_RANKS, Net, Planted, ranks_found, train
from torch import nn

from peftkernels.allocation import Budget, BudgetAllocator
from peftkernels.allocation.strategies import AdaLora, Prior, Random, Uniform
from peftkernels.allocation.strategies.prior import quantiles
from peftkernels.allocation.strategies.rank_prior import (
    PriorModule,
    RankPrior,
    gated_shapes,
    initial_ranks,
    linear_shapes,
    match,
)
from peftkernels.nn import AdaLoRALinear

# What (0, 1, 3, 5) at depths 0, 1/3, 2/3, 1 says about eight layers and 17 ranks.
DEEPER = (0, 0, 1, 2, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def learned() -> RankPrior:
    """The prior of a run of AdaLoRA that found the ranks of the four-layer problem."""
    problem = Planted()
    allocator = BudgetAllocator(
        problem.student, AdaLora(), total_step=300, budget=Budget(9), tinit=60, tfinal=60, exact_budget=True
    )
    optimizer = torch.optim.AdamW(problem.parameters, lr=2e-2, weight_decay=0.0)
    allocator.attach(optimizer)
    train(problem, allocator, optimizer, 300)
    return RankPrior.of(allocator)


def deep_shapes() -> dict[str, tuple[int, int]]:
    return linear_shapes(Net([nn.Linear(24, 24) for _ in DEEPER]))


def test_a_run_is_remembered_with_its_architecture(learned: RankPrior, tmp_path: Path) -> None:
    depths = (0.0, 1 / 3, 2 / 3, 1.0)
    expected = [PriorModule("layers", depth, 24, 24, 6, kept) for depth, kept in zip(depths, TRUE_RANKS, strict=True)]
    assert list(learned.modules) == expected
    learned.save(tmp_path / "folder" / "prior.json")
    assert RankPrior.load(tmp_path / "folder" / "prior.json") == learned


def test_it_gives_a_deeper_model_its_true_ranks(learned: RankPrior) -> None:
    ranks = initial_ranks(learned, deep_shapes(), sum(DEEPER), least=0)
    assert tuple(ranks.values()) == DEEPER
    assert list(ranks) == [f"layers.{layer}" for layer in range(8)]


def test_layers_built_by_it_learn_more_than_even_ones(learned: RankPrior) -> None:
    losses = []
    for ranks in (list(initial_ranks(learned, deep_shapes(), 17, least=0).values()), [2, 2, 2, 2, 2, 2, 2, 3]):
        problem = Planted(DEEPER, initial_ranks=ranks)
        optimizer = torch.optim.AdamW(problem.parameters, lr=2e-2, weight_decay=0.0)
        for x, target in problem.batches(200):
            loss = (problem.student(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 0.75 * losses[1]


def test_a_strategy_that_knows_nothing_finds_the_ranks_by_it(learned: RankPrior) -> None:
    found = ranks_found(Prior(Uniform(), learned, half_life=1e9), Planted(DEEPER), steps=20)
    assert max(abs(rank - true) for rank, true in zip(found, DEEPER, strict=True)) <= 1
    alone = ranks_found(Uniform(), Planted(DEEPER), steps=20)
    assert max(abs(rank - true) for rank, true in zip(alone, DEEPER, strict=True)) > 1


def test_a_short_run_is_closer_to_the_truth_with_it(learned: RankPrior) -> None:
    def away(found: list[int]) -> int:
        return sum(abs(rank - true) for rank, true in zip(found, DEEPER, strict=True))

    with_it = away(ranks_found(Prior(AdaLora(), learned), Planted(DEEPER), steps=20))
    assert with_it <= 4 < away(ranks_found(AdaLora(), Planted(DEEPER), steps=20))


def test_a_wrong_prior_is_forgotten() -> None:
    wrong = RankPrior(
        tuple(PriorModule("layers", depth / 3, 24, 24, 6, kept) for depth, kept in enumerate(reversed(TRUE_RANKS)))
    )
    assert ranks_found(Prior(AdaLora(), wrong, half_life=10)) == list(TRUE_RANKS)
    assert ranks_found(Prior(AdaLora(), wrong, half_life=1e9)) == list(reversed(TRUE_RANKS))


def test_the_weight_is_saved_and_resumed(learned: RankPrior) -> None:
    states = []
    for cut in (None, 12):
        problem = Planted()
        allocator = None
        for _ in range(1 if cut is None else 2):
            state = None if allocator is None else allocator.state_dict()
            if allocator is not None:
                allocator.close()
            allocator = BudgetAllocator(problem.student, Prior(AdaLora(), learned), total_step=40, budget=Budget(9))
            if state is not None:
                allocator.load_state_dict(state)
            else:
                optimizer = torch.optim.AdamW(problem.parameters, lr=2e-2)
            allocator.attach(optimizer)
            batches = list(problem.batches(25))
            part = batches if cut is None else batches[:cut] if state is None else batches[cut:]
            for x, target in part:
                (problem.student(x) - target).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert allocator is not None
        states.append(allocator.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert float(states[0]["strategy.weight"]) == pytest.approx(2 ** (-25 / 100))


def test_the_nearest_architecture_is_matched(learned: RankPrior) -> None:
    wide = RankPrior(tuple(PriorModule("layers", depth / 3, 96, 96, 6, 1) for depth in range(4)))
    other = RankPrior((PriorModule("q_proj", 0.5, 24, 24, 6, 1),))
    assert match([other, wide, learned], deep_shapes()) is learned
    assert learned.distance({f"layers.{layer}": (24, 24) for layer in range(4)}) == 0.0
    with pytest.raises(ValueError, match="found the nearest at a distance of inf"):
        match([other], deep_shapes())
    with pytest.raises(ValueError, match="priors: found none"):
        match([], deep_shapes())


def test_gated_layers_have_the_shapes_of_their_linear_ones() -> None:
    model = Net([nn.Linear(5, 7), nn.Linear(7, 5)])
    problem = Planted((1, 1))
    names = ["layers.0", "layers.1"]
    assert linear_shapes(model) == {"layers.0": (7, 5), "layers.1": (5, 7)}
    assert gated_shapes(names, list(problem.student.layers)) == dict.fromkeys(names, (24, 24))


def test_ranks_stay_within_what_layers_can_have(learned: RankPrior) -> None:
    narrow = {f"layers.{layer}": (3, 24) for layer in range(4)}
    assert list(initial_ranks(learned, narrow, 10, least=1).values()) == [1, 3, 3, 3]
    assert list(initial_ranks(learned, narrow, 12).values()) == [3, 3, 3, 3]
    for total in (3, 13):
        with pytest.raises(ValueError, match=f"total: found {total}, expected from 4 to 12"):
            initial_ranks(learned, narrow, total)


def test_quantiles_of_ties_are_equal() -> None:
    assert quantiles(torch.tensor([0.0, 0.0, 5.0, -1.0])).tolist() == [0.5, 0.5, 0.875, 0.125]


def test_wrong_arguments_and_files_are_named(learned: RankPrior, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="prior: found dict"):
        Prior(Random(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: found 2"):
        Prior(Random(), learned, weight=2)
    with pytest.raises(ValueError, match="half_life: found 0"):
        Prior(Random(), learned, half_life=0)
    with pytest.raises(ValueError, match="found the kind 'q_proj', expected one of layers"):
        learned.expected({"0.q_proj": (24, 24)})
    path = tmp_path / "prior.json"
    path.write_text(json.dumps({"kind": "peftkernels rank pattern", "modules": [{"colour": 1}]}))
    with pytest.raises(ValueError, match=r"prior.json: modules\[0\]: found the fields \['colour'\], expected kind"):
        RankPrior.load(path)
    path.write_text(json.dumps({"kind": "peftkernels costs"}))
    with pytest.raises(ValueError, match="expected 'peftkernels rank pattern'"):
        RankPrior.load(path)


@pytest.mark.parametrize("field", ["kind", "depth", "n", "k", "rank", "kept"])
@pytest.mark.parametrize("value", [None, "x", True, float("nan"), float("inf"), -1, [], {"x": [1]}, 10**400])
def test_a_prior_with_a_wrong_value_is_refused_with_file_and_field(
    learned: RankPrior, tmp_path: Path, field: str, value: object
) -> None:
    if (field, value) == ("kind", "x"):
        return
    path = tmp_path / "prior.json"
    learned.save(path)
    content = json.loads(path.read_text())
    content["modules"][1][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"prior\.json: modules\[1\].*{field}"):
        RankPrior.load(path)


def test_a_pattern_known_by_its_ranks(learned: RankPrior) -> None:
    layers = {f"blocks.{i}.q": AdaLoRALinear.from_linear(nn.Linear(6, 8), r=4, lora_alpha=4) for i in (0, 1)}
    prior = RankPrior.from_ranks(layers, {"blocks.0.q": 1, "blocks.1.q": 3})
    assert prior.modules == (PriorModule("q", 0.0, 8, 6, 4, 1), PriorModule("q", 1.0, 8, 6, 4, 3))
    with pytest.raises(
        ValueError, match=r"kept: found other modules than the layers', expected the same: blocks\.1\.q"
    ):
        RankPrior.from_ranks(layers, {"blocks.0.q": 1})
    with pytest.raises(ValueError, match=r"expected a depth in .* and 0 <= kept <= rank"):
        RankPrior.from_ranks(layers, {"blocks.0.q": 5, "blocks.1.q": 3})
