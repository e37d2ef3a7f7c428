"""Which ranks a budget keeps, and how masks reach gates and plans."""

from __future__ import annotations

import pytest
import torch
from small_models import adapter_layers

from peftkernels import RankPlan
from peftkernels.backends.eager.plans import update_plans, zero_gates
from peftkernels.ops.selection import select_ranks


def test_threshold_is_the_kth_smallest_and_ties_go() -> None:
    scores = torch.tensor([5.0, 1.0, 3.0, 3.0, 2.0, 4.0])
    keep, threshold = select_ranks(scores, 3, exact=False)
    assert threshold.item() == 3.0
    assert keep.tolist() == [True, False, False, False, False, True]


def test_exact_budget_keeps_the_earlier_of_ties() -> None:
    scores = torch.tensor([3.0, 1.0, 3.0, 3.0, 2.0, 4.0])
    keep, threshold = select_ranks(scores, 3, exact=True)
    assert threshold.item() == 3.0
    assert keep.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("exact", [False, True])
def test_without_ties_both_rules_keep_the_budget(exact: bool) -> None:
    scores = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float()
    for budget in range(1, 40):
        keep, threshold = select_ranks(scores, budget, exact=exact)
        assert keep.tolist() == (scores >= 40 - budget).tolist()
        assert threshold.item() == 39 - budget


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("budget", [4, 9])
def test_a_budget_for_all_masks_none(exact: bool, budget: int) -> None:
    keep, threshold = select_ranks(torch.zeros(4), budget, exact=exact)
    assert keep.all()
    assert threshold.item() == -torch.inf


def test_update_plans_equals_update_one_by_one() -> None:
    torch.manual_seed(0)
    ranks = [5, 1, 8, 5, 0, 8, 8]
    plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r in ranks]
    expected = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r in ranks]
    tensors = [(plan.state, plan.order, plan.counts) for plan in plans]
    for _ in range(3):
        states = torch.randint(0, 3, (sum(ranks),), dtype=torch.uint8)
        update_plans(plans, states)
        for plan, own, reference, state in zip(plans, tensors, expected, states.split(ranks), strict=True):
            reference.update_(state)
            assert plan.state is own[0]
            for tensor, other in zip(own, (reference.state, reference.order, reference.counts), strict=True):
                assert tensor.dtype == other.dtype
                assert torch.equal(tensor, other)


def test_zero_gates_leaves_kept_bits_and_moves_the_version() -> None:
    layers = [*adapter_layers((7, 5), r=4).values(), *adapter_layers((6, 3), r=3, dtype=torch.bfloat16).values()]
    gates = [layer.lora_E for layer in layers]
    before = [gate.detach().clone() for gate in gates]
    versions = [gate._version for gate in gates]
    keep = torch.tensor([True, False, True, False, False, True, True])
    zero_gates(gates, keep)
    for gate, old, part in zip(gates, before, keep.split([4, 3]), strict=True):
        assert torch.equal(gate[part], old[part])
        assert not gate[~part].any()
        assert not torch.signbit(gate[~part]).any()
    assert all(gate._version > version for gate, version in zip(gates, versions, strict=True))
