"""Averages, scores and masks of ranks in Triton kernels, beside plain tensor code."""

from __future__ import annotations

import pytest
import torch
from support.allocation_calls import (
    BETA1,
    BETA2,
    LAYERS,
    Averages,
    assert_same,
    averages_of,
    counted,
    in_every_dtype,
    in_every_layout,
)
from torch import Tensor

from peftkernels import RankPlan, RankState
from peftkernels.backends.eager.allocation import EagerKernels
from peftkernels.backends.triton import allocation
from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.selection import select_ranks


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


# A, B, E of one dtype, and of several: peft's adapters may have a gate in another dtype than the factors.
DTYPES = {
    "fp32": (torch.float32,) * 3,
    "fp16": (torch.float16,) * 3,
    "mixed": (torch.float16, torch.float16, torch.float32),
}


@in_every_layout
@pytest.mark.parametrize("dtypes", DTYPES)
def test_averages_equal_plain_ones_to_the_bit(layers: str, dtypes: str, device: torch.device, seed: int) -> None:
    drawn = Averages.drawn(layers, DTYPES[dtypes], device, seed)
    layout, found, expected = drawn.layout, drawn.copies(), drawn.copies()
    kernels, plain = allocation.kernels(), EagerKernels()
    for step in range(2):
        gradients = drawn.gradients()
        if step == 1:
            gradients[4] = None
        rates = (BETA1, BETA2)
        finite = kernels.update_averages(layout, drawn.parameters, gradients, *found, *rates)
        assert finite.dtype is torch.bool and finite.shape == () and finite.device == device and bool(finite)
        plain.update_averages(layout, drawn.parameters, gradients, *expected, *rates)
        assert_same(found, expected)
    assert not torch.equal(found[0], drawn.sensitivity)


@pytest.mark.parametrize("fault", ["fused", "swapped"])
def test_other_roundings_and_rates_would_be_seen(fault: str, device: torch.device, seed: int) -> None:
    """What the test above compares differs where a product joins an addition, and where the rates change places."""
    drawn = averages_of("r12", device, seed)
    gradients = drawn.gradients()
    found = drawn.copies()
    allocation.kernels().update_averages(drawn.layout, drawn.parameters, gradients, *found, BETA1, BETA2)
    beta1 = BETA2 if fault == "swapped" else BETA1
    views = zip(*map(drawn.layout.views, (drawn.sensitivity, found[0])), drawn.parameters, gradients, strict=True)
    different = 0
    for before, after, parameter, gradient in views:
        assert gradient is not None
        importance = (parameter * gradient).abs()
        if fault == "fused":
            # Both products exact until the sum is rounded once: closer than a fused multiply-add, which rounds one.
            exact = before.double() * float(torch.tensor(BETA1)) + (importance * (1 - BETA1)).double()
            faulty = exact.float()
        else:
            faulty = before * beta1 + importance * (1 - beta1)
        different += int((faulty != after).sum())
    assert different > drawn.layout.numel / 100


@in_every_layout
def test_scores_are_within_the_rounding_of_their_sums(layers: str, device: torch.device, seed: int) -> None:
    """No term is negative, so that every rounding on a term's way into its score is a relative error of 2⁻²⁴ at most:
    the product, ten additions in a tile, six among its 32 parts and those before, the division, two means added.
    """
    drawn = averages_of(layers, device, seed)
    found = allocation.kernels().rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)
    exact = EagerKernels().rank_scores(drawn.layout, drawn.sensitivity.double(), drawn.uncertainty.double())
    assert found.dtype is torch.float32 and found.shape == (drawn.layout.total_rank,)
    roundings = 1 + 10 + 6 + 1 + 2
    assert bool((found > 0).all())
    assert float(((found - exact).abs() / exact).max()) <= roundings * 2**-24


@in_every_dtype
def test_scores_of_an_update_are_those_of_its_averages(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Sums that the update leaves give the bits that a pass over the averages gives, also after a step not taken."""
    drawn = averages_of("odd", device, seed, *(dtype,) * 3)
    kernels, both = allocation.kernels(), drawn.copies()
    for skip in (False, True):
        skipped = torch.tensor([False, skip], device=device)[1]
        kernels.update_averages(drawn.layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2, skipped)
        with counted() as names:
            found = kernels.rank_scores(drawn.layout, *both)
        assert names == ["add_parts"]
        assert_same([found], [allocation.kernels().rank_scores(drawn.layout, *both)])


def test_scores_follow_averages_that_were_loaded(device: torch.device, seed: int) -> None:
    drawn = averages_of("odd", device, seed)
    kernels, both = allocation.kernels(), drawn.copies()
    kernels.update_averages(drawn.layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2)
    both[0].copy_(drawn.sensitivity)
    found = kernels.rank_scores(drawn.layout, *both)
    assert_same([found], [allocation.kernels().rank_scores(drawn.layout, *both)])
    # The averages of somebody else, in other tensors.
    found = kernels.rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)
    assert_same([found], [allocation.kernels().rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)])


@pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("culprit", ["inf", "nan", "overflow", "parameter_without_gradient"])
@pytest.mark.parametrize("layers", ["r12", "odd"])
def test_one_product_that_is_not_finite_leaves_the_averages(
    layers: str, culprit: str, device: torch.device, seed: int
) -> None:
    drawn = averages_of(layers, device, seed)
    factor = seed % len(drawn.parameters)
    gradients = drawn.gradients()
    place = int(torch.randint(drawn.parameters[factor].numel(), (), generator=drawn.generator))
    parameter, gradient = drawn.parameters[factor].view(-1), gradients[factor]
    assert gradient is not None
    if culprit == "overflow":
        parameter[place] = gradient.view(-1)[place] = 1e30
    elif culprit == "parameter_without_gradient":
        parameter[place] = torch.inf
        gradients[factor] = None
    else:
        gradient.view(-1)[place] = float(culprit)
    found = drawn.copies()
    finite = allocation.kernels().update_averages(drawn.layout, drawn.parameters, gradients, *found, BETA1, BETA2)
    assert not bool(finite)
    assert_same(found, (drawn.sensitivity, drawn.uncertainty))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_a_skipped_step_leaves_the_averages_and_is_still_checked(
    skip: bool, finite: bool, device: torch.device, seed: int
) -> None:
    drawn = averages_of("odd", device, seed)
    gradients = drawn.gradients()
    if not finite:
        gradients[-1].fill_(torch.nan)  # type: ignore[union-attr]
    skipped = torch.tensor([False, skip], device=device)[1]
    found = drawn.copies()
    both = (drawn.layout, drawn.parameters, gradients)
    assert bool(allocation.kernels().update_averages(*both, *found, BETA1, BETA2, skipped)) is finite
    unchanged = torch.equal(found[0], drawn.sensitivity) and torch.equal(found[1], drawn.uncertainty)
    assert unchanged is (skip or not finite)


def test_factors_of_any_strides(device: torch.device, seed: int) -> None:
    """A transposed factor and an expanded gradient; values change between steps while tensors stay where they are."""
    drawn = averages_of("odd", device, seed)
    parameters = [parameter.t().contiguous().t() for parameter in drawn.parameters]
    assert not all(parameter.is_contiguous() for parameter in parameters)
    gradients = drawn.gradients()
    gradients[3] = torch.randn(65, device=device).mul_(1e-2).expand(33, 65)
    kernels, plain = allocation.kernels(), EagerKernels()
    found, expected = drawn.copies(), drawn.copies()
    for _ in range(2):
        kernels.update_averages(drawn.layout, parameters, gradients, *found, BETA1, BETA2)
        plain.update_averages(drawn.layout, parameters, gradients, *expected, BETA1, BETA2)
        assert_same(found, expected)
        for parameter in parameters:
            parameter.mul_(0.75)


def test_tensors_at_odd_addresses(device: torch.device, seed: int) -> None:
    """Vectors of four need multiples of 16 bytes: gradients that are parts of a bucket may lie anywhere. Same bits."""
    drawn = averages_of("r12", device, seed)
    gradients = drawn.gradients()
    scores = []
    for odd in (False, True):
        both, kernels = drawn.copies(), allocation.kernels()
        if odd:
            for place, gradient in enumerate(gradients):
                assert gradient is not None
                bucket = torch.empty(gradient.numel() + 1, device=device)
                gradients[place] = bucket[1:].view(gradient.shape).copy_(gradient)
        with counted(full=True) as names:
            kernels.update_averages(drawn.layout, drawn.parameters, gradients, *both, BETA1, BETA2)
        assert ("unaligned" in names[-1]) is odd
        scores += [(*both, kernels.rank_scores(drawn.layout, *both))]
    assert_same(*scores)


def _scores(count: int, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "ties":
        return torch.randint(4, (count,), generator=generator).float()
    scores = torch.randn(count, generator=generator)
    if kind == "positive":
        # Products of small numbers, some of which underflow.
        return scores.abs() * 10.0 ** -torch.randint(46, (count,), generator=generator).float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45])
    return torch.where(scores > 0.5, special[torch.randint(6, (count,), generator=generator)], scores)


@pytest.mark.parametrize("kind", ["positive", "ties", "special"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [1, 5, 137, 8193])
def test_selection_equals_plain_selection(count: int, exact: bool, kind: str, device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = _scores(count, kind, generator).to(device)
    kernels = allocation.kernels()
    budgets = {0, 1, count // 2, int(torch.randint(count, (), generator=generator)), count - 1, count}
    for budget in sorted(budgets):
        keep, threshold = kernels.select(scores, budget, exact)
        # At b0 the plain rule has no threshold to index.
        expected_keep, expected_threshold = select_ranks(scores, budget, exact=exact)
        assert keep.dtype is torch.bool and torch.equal(keep, expected_keep), f"budget {budget} of {count}"
        assert threshold.shape == () and threshold.dtype is torch.float32 and threshold == expected_threshold


def test_selection_of_65536_ranks(device: torch.device, seed: int) -> None:
    scores = _scores(65536, "positive", torch.Generator().manual_seed(seed)).to(device)
    keep, threshold = allocation.kernels().select(scores, torch.tensor(40000, device=device), True)
    expected = select_ranks(scores, 40000, exact=True)
    assert_same((keep, threshold), expected)
    assert int(keep.sum()) == 40000


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_the_budget_may_be_on_the_device(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    scores = _scores(50, "ties", torch.Generator().manual_seed(seed)).to(device)
    kernels = allocation.kernels()
    for budget in (-3, 0, 17, 50, 1000):
        found = kernels.select(scores, torch.tensor(budget, dtype=dtype, device=device), True)
        assert_same(found, select_ranks(scores, min(max(budget, 0), 50), exact=True))
        assert_same(kernels.select(scores, budget, True), found)


@pytest.mark.parametrize("mask_now", [None, False, True])
@pytest.mark.parametrize("masked", [RankState.PROBE, RankState.DEAD], ids=str)
@in_every_layout
def test_masks_equal_plain_ones(
    layers: str, masked: RankState, mask_now: bool | None, device: torch.device, seed: int
) -> None:
    layout = FactorLayout.of(LAYERS[layers])
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(layout.total_rank, generator=generator) < 0.6).to(device)
    now = None if mask_now is None else torch.tensor([not mask_now, mask_now], device=device)[1]
    dtypes = (torch.float32, torch.float16, torch.float64)
    given = [torch.randn(r, 1, generator=generator).to(device, dtypes[i % 3]) for i, r in enumerate(layout.ranks)]
    written = []
    for kernels in (allocation.kernels(), EagerKernels()):
        gates = [gate.clone() for gate in given]
        # One that is a column of something else.
        gates[-1] = torch.stack((gates[-1], gates[-1]), 1)[:, 1]
        plans = [RankPlan.from_state(torch.full((r,), 1, dtype=torch.uint8, device=device)) for r in layout.ranks]
        versions = [gate._version for gate in gates]
        kernels.apply(layout, keep, gates, plans, int(masked), now)
        assert all(gate._version > before for gate, before in zip(gates, versions, strict=True))
        written.append([*gates, *[getattr(plan, name) for plan in plans for name in RankPlan.__slots__]])
    assert_same(*written)
