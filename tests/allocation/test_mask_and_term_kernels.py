"""Every implementation of the allocation kernels beside the eager one: selection, masks, orthogonality term."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import DTYPES, ON_THE_CPU, PARTICULAR_RANKS, drawn, lay_out, layer_lists, served
from torch import Tensor

from peftkernels import RankPlan, RankState
from peftkernels.backends.eager.allocation import EagerKernels
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.selection import select_ranks


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize("exact", [False, True])
def test_selection_with_ties_and_a_budget_on_the_device(impl: str, exact: bool) -> None:
    kernels = served(impl)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        scores = torch.randint(0, 6, (13,), generator=generator).float()
        for budget in (0, 1, 5, 12, 13, 20):
            keep, threshold = select_ranks(scores, budget, exact=exact)
            for given_budget in (budget, torch.tensor(budget), torch.tensor(budget, dtype=torch.int32)):
                found = kernels.select(scores, given_budget, exact)
                assert torch.equal(found[0], keep)
                assert torch.equal(found[1], threshold)
            assert int(keep.sum()) == min(budget, 13) if exact else int(keep.sum()) <= min(budget, 13)


@drawn
@given(
    ranks=st.lists(st.one_of(st.sampled_from(PARTICULAR_RANKS), st.integers(0, 20)), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    masked_state=st.sampled_from((RankState.PROBE, RankState.DEAD)),
    dtype=st.sampled_from(DTYPES),
    mask_now=st.sampled_from((None, True, False)),
    strided=st.booleans(),
)
def test_masks_reach_gates_and_plans_as_in_plain(
    kernels: AllocationKernels,
    ranks: list[int],
    seed: int,
    masked_state: RankState,
    dtype: torch.dtype,
    mask_now: bool | None,
    strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = FactorLayout.of([(r, 3, 5) for r in ranks])
    keep = torch.rand(sum(ranks), generator=generator) < 0.6
    values = [torch.randn(r, 1, generator=generator).to(dtype) for r in ranks]
    now = None if mask_now is None else torch.tensor(mask_now)
    results = []
    for own in (kernels, EagerKernels()):
        gates = [lay_out(value.clone(), "strided" if strided else "contiguous") for value in values]
        plans = [RankPlan.from_mask(torch.rand(r, generator=generator) < 0.5) for r in ranks]
        versions = [gate._version for gate in gates]
        own.apply(layout, keep, gates, plans, masked_state, now)
        assert all(gate._version > version for gate, version in zip(gates, versions, strict=True))
        results.append((gates, plans))
    (gates, plans), (expected_gates, expected_plans) = results
    for gate, expected, value, kept in zip(gates, expected_gates, values, keep.split(ranks), strict=True):
        assert torch.equal(gate, expected)
        assert not torch.signbit(gate[~kept]).any() or mask_now is False
        assert torch.equal(gate[kept], value[kept])
    for plan, expected_plan, kept in zip(plans, expected_plans, keep.split(ranks), strict=True):
        for name in ("state", "order", "counts"):
            found, wanted = getattr(plan, name), getattr(expected_plan, name)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
        assert plan.state.tolist() == [2 if k or mask_now is False else int(masked_state) for k in kept.tolist()]


@drawn
@given(
    layers=layer_lists,
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(("contiguous", "transposed", "strided")),
    masked=st.booleans(),
    scale=st.sampled_from((1.0, 0.3, 1024.0)),
)
def test_orthogonality_equals_plain_up_to_rounding(
    kernels: AllocationKernels,
    layers: list[tuple[int, int, int]],
    seed: int,
    dtype: torch.dtype,
    how: str,
    masked: bool,
    scale: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return lay_out((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2).to(dtype), how)

    lora_A, lora_B = [draw(r, k) for r, k, _ in layers], [draw(n, r) for r, _, n in layers]
    keep = [torch.rand(r, generator=generator) < 0.6 for r, _, _ in layers] if masked else None
    exact = [[factor.double() for factor in kind] for kind in (lora_A, lora_B)]
    value, gradients = EagerKernels().orthogonality(*exact, 0.7, keep)
    assert gradients is not None
    narrow = dtype if dtype is torch.float64 else torch.float32
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if narrow is torch.float64 else {"rtol": 3e-5, "atol": 3e-6}

    own_value, own_gradients = kernels.orthogonality(lora_A, lora_B, 0.7, keep)
    assert own_value.shape == () and own_value.dtype == narrow
    torch.testing.assert_close(own_value.double(), value, **tolerance)
    assert own_gradients is not None
    for own, gradient in zip(own_gradients, gradients, strict=True):
        assert own.dtype == narrow
        torch.testing.assert_close(own.double(), gradient, **tolerance)

    only_value, nothing = kernels.orthogonality(lora_A, lora_B, 0.7, keep, gradients=False)
    assert nothing is None
    assert torch.equal(only_value, own_value)

    before = [draw(*factor.shape) for factor in (*lora_A, *lora_B)]
    targets = copy.deepcopy(before)
    versions = [target._version for target in targets]
    added_value, nothing = kernels.orthogonality(lora_A, lora_B, 0.7, keep, targets, scale)
    assert nothing is None
    assert torch.equal(added_value, own_value)
    for target, start, own, version in zip(targets, before, own_gradients, versions, strict=True):
        assert target._version > version
        assert target.stride() == start.stride()
        expected = start + (scale * own).to(dtype)
        rounding = torch.finfo(dtype).eps
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(target, expected, rtol=2 * rounding, atol=2 * rounding * max(largest, 1e-3))


def test_a_target_given_twice_gets_both_gradients(kernels: AllocationKernels) -> None:
    """Layers may share a factor."""
    torch.manual_seed(0)
    lora_A, lora_B = [torch.randn(6, 900)] * 2, [torch.randn(700, 6), torch.randn(700, 6)]
    shared = torch.zeros(6, 900)
    targets = [shared, shared, *(torch.zeros(700, 6) for _ in range(2))]
    kernels.orthogonality(lora_A, lora_B, 1.0, None, targets)
    _, gradients = EagerKernels().orthogonality(lora_A, lora_B, 1.0)
    assert gradients is not None
    torch.testing.assert_close(shared, gradients[0] + gradients[1])
