"""Every implementation of the allocation kernels beside the plain one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftkernels import RankPlan, RankState
from peftkernels.allocation.kernels import IMPLEMENTATIONS, AllocationKernels, FactorLayout, kernels_for
from peftkernels.allocation.kernels.layout import ALIGNMENT
from peftkernels.allocation.kernels.plain import PlainKernels
from peftkernels.allocation.selection import select_ranks
from peftkernels.backends import cpu_allocation

CPU = torch.device("cpu")
# Triton's kernels add in another order, in float32 alone, and are slow where they are interpreted: they have tests of
# their own.
ON_THE_CPU = tuple(name for name in IMPLEMENTATIONS if name != "triton")
BETA1, BETA2 = 0.85, 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARTICULAR = (0, 1, 12, 33)


@pytest.fixture(params=[name for name in ON_THE_CPU if name != "plain"])
def kernels(request: pytest.FixtureRequest) -> AllocationKernels:
    try:
        return kernels_for(CPU, torch.float32, request.param)
    except RuntimeError as error:
        pytest.skip(str(error))


@dataclass
class Problem:
    """Layers (r, K, N), their factors and gradients, and averages that have seen some steps."""

    layout: FactorLayout
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    sensitivity: Tensor
    uncertainty: Tensor

    def update(self, kernels: AllocationKernels, skip: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """finite, Ī and Ū after an update of copies."""
        sensitivity, uncertainty = self.sensitivity.clone(), self.uncertainty.clone()
        finite = kernels.update_averages(
            self.layout, self.parameters, self.gradients, sensitivity, uncertainty, BETA1, BETA2, skip
        )
        return finite, sensitivity, uncertainty


def _lay_out(tensor: Tensor, how: str) -> Tensor:
    """The same values in other strides."""
    if how == "transposed":
        return tensor.t().contiguous().t()
    if how == "strided":
        wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1] + 1, dtype=tensor.dtype)
        wide[:, 1::2] = tensor
        return wide[:, 1::2]
    return tensor


def _problem(
    layers: list[tuple[int, int, int]],
    seed: int = 0,
    parameter_dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    missing: int = 0,
    how: str = "contiguous",
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    layout = FactorLayout.of(layers)

    def draw(shape: tuple[int, int], to: torch.dtype) -> Tensor:
        # Magnitudes over many powers of two, so that sums round.
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return _lay_out((values * torch.exp2(torch.randn(shape, generator=generator) * 3)).to(to), how)

    parameters = [draw(shape, parameter_dtype) for shape in layout.shapes]
    gradients: list[Tensor | None] = [draw(shape, gradient_dtype or parameter_dtype) for shape in layout.shapes]
    for index in torch.randperm(len(gradients), generator=generator)[:missing].tolist():
        gradients[index] = None
    averages = []
    for _ in range(2):
        average = torch.zeros(layout.numel, dtype=dtype)
        for view in layout.views(average):
            view.copy_(draw(tuple(view.shape), dtype).abs())
        averages.append(average)
    return Problem(layout, parameters, gradients, *averages)


_extents = st.sampled_from((1, 3, 7, 16, 31, 65, 129, 1030))
_layers = st.lists(
    st.tuples(st.one_of(st.sampled_from(PARTICULAR), st.integers(0, 20)), _extents, _extents), min_size=1, max_size=4
)
_problems = st.builds(
    _problem,
    _layers,
    seed=st.integers(0, 2**31),
    parameter_dtype=st.sampled_from(DTYPES),
    gradient_dtype=st.sampled_from((None, torch.float32, torch.bfloat16)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    missing=st.integers(0, 2),
    how=st.sampled_from(("contiguous", "transposed", "strided")),
)
_drawn = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _check_averages(kernels: AllocationKernels, problem: Problem) -> None:
    """Equal to plain to the bit, whatever is done with the update."""
    finite, sensitivity, uncertainty = problem.update(PlainKernels())
    assert bool(finite)
    found = problem.update(kernels)
    assert found[0].shape == () and found[0].dtype == torch.bool and bool(found[0])
    assert torch.equal(found[1], sensitivity)
    assert torch.equal(found[2], uncertainty)


@_drawn
@given(problem=_problems)
def test_averages_and_scores_equal_plain_to_the_bit(kernels: AllocationKernels, problem: Problem) -> None:
    _check_averages(kernels, problem)
    _, sensitivity, uncertainty = problem.update(kernels)
    scores = kernels.rank_scores(problem.layout, sensitivity, uncertainty)
    assert torch.equal(scores, PlainKernels().rank_scores(problem.layout, sensitivity, uncertainty))
    assert torch.equal(scores, _scores_factor_by_factor(problem.layout, sensitivity, uncertainty))


def _scores_factor_by_factor(layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
    products = layout.views(sensitivity * uncertainty)
    parts = [
        lora_E.squeeze(1) + (lora_A.mean(1) + lora_B.mean(0))
        for lora_A, lora_B, lora_E in zip(products[::3], products[1::3], products[2::3], strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_threads_change_no_bit(kernels: AllocationKernels, threads: int) -> None:
    """Sizes at which work is shared out, in this code and in ATen's sums."""
    problem = _problem([(1, 40000, 9), (12, 3072, 768), (2, 7, 33000), (0, 5, 5), (100, 700, 1111), (1, 3, 33333)])
    torch.set_num_threads(threads)
    _check_averages(kernels, problem)
    _, sensitivity, uncertainty = problem.update(kernels)
    scores = kernels.rank_scores(problem.layout, sensitivity, uncertainty)
    assert torch.equal(scores, _scores_factor_by_factor(problem.layout, sensitivity, uncertainty))


class _FusedMultiplyAdd(PlainKernels):
    """β·average rounded together with the sum, as a processor's fused instruction does."""

    name = "fused"

    def update_averages(
        self, layout: Any, parameters: Any, gradients: Any, sensitivity: Any, uncertainty: Any, *rest: Any
    ) -> Tensor:
        beta1, beta2 = rest[:2]
        importance = torch.zeros_like(sensitivity)
        for view, parameter, gradient in zip(layout.views(importance), parameters, gradients, strict=True):
            view.copy_((parameter * gradient).abs())
        for average, beta in ((sensitivity, beta1), (uncertainty, beta2)):
            taken = (importance * (1 - beta)).double()
            average.copy_(average.double() * torch.tensor(beta).double() + taken)
            importance = (importance - sensitivity).abs()
        return torch.tensor(True)


class _SwappedBetas(PlainKernels):
    name = "swapped"

    def update_averages(
        self, layout: Any, parameters: Any, gradients: Any, sensitivity: Any, uncertainty: Any, *rest: Any
    ) -> Tensor:
        beta1, beta2, skip = rest
        return super().update_averages(layout, parameters, gradients, sensitivity, uncertainty, beta2, beta1, skip)


@pytest.mark.parametrize("fault", [_FusedMultiplyAdd, _SwappedBetas])
def test_faults_are_caught(fault: type[PlainKernels]) -> None:
    problem = _problem([(12, 65, 31)])
    _check_averages(PlainKernels(), problem)
    with pytest.raises(AssertionError):
        _check_averages(fault(), problem)


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("where", ["parameters", "gradients"])
@pytest.mark.parametrize("index", [0, 4, 8])
def test_what_is_not_finite_leaves_every_bit(impl: str, bad: float, where: str, index: int) -> None:
    """The first factor and the last: whatever was read before it is not written."""
    kernels = _named(impl)
    problem = _problem([(5, 1030, 9), (3, 7, 5), (12, 33, 1100)])
    tensor = getattr(problem, where)[index]
    tensor.view(-1)[-1] = bad
    if bad == 1e38:
        # Two finite numbers whose product is not.
        problem.parameters[index].view(-1)[-1] = problem.gradients[index].view(-1)[-1] = bad
    finite, sensitivity, uncertainty = problem.update(kernels)
    assert not bool(finite)
    assert torch.equal(sensitivity, problem.sensitivity)
    assert torch.equal(uncertainty, problem.uncertainty)


def _named(impl: str) -> AllocationKernels:
    try:
        return kernels_for(CPU, torch.float32, impl)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_skip_leaves_every_bit_and_tells_whether_all_was_finite(impl: str) -> None:
    kernels = _named(impl)
    problem = _problem([(5, 30, 9)])
    finite, sensitivity, uncertainty = problem.update(kernels, torch.tensor(True))
    assert bool(finite)
    assert torch.equal(sensitivity, problem.sensitivity)
    assert torch.equal(uncertainty, problem.uncertainty)
    finite, sensitivity, _ = problem.update(kernels, torch.tensor(False))
    assert torch.equal(sensitivity, problem.update(PlainKernels())[1])
    problem.parameters[0][0, 0] = math.nan
    assert not bool(problem.update(kernels, torch.tensor(True))[0])


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_a_missing_gradient_counts_as_zero(impl: str) -> None:
    kernels = _named(impl)
    problem = _problem([(5, 30, 9), (4, 8, 8)])
    problem.gradients[1] = None
    without = problem.update(kernels)
    problem.gradients[1] = torch.zeros_like(problem.parameters[1])
    with_zero = problem.update(kernels)
    assert all(torch.equal(one, other) for one, other in zip(without, with_zero, strict=True))
    assert not torch.equal(without[1], problem.sensitivity)


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize("exact", [False, True])
def test_selection_with_ties_and_a_budget_on_the_device(impl: str, exact: bool) -> None:
    kernels = _named(impl)
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


@_drawn
@given(
    ranks=st.lists(st.one_of(st.sampled_from(PARTICULAR), st.integers(0, 20)), min_size=1, max_size=5),
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
    for own in (kernels, PlainKernels()):
        gates = [_lay_out(value.clone(), "strided" if strided else "contiguous") for value in values]
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


@_drawn
@given(
    layers=_layers,
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
        return _lay_out((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2).to(dtype), how)

    lora_A, lora_B = [draw(r, k) for r, k, _ in layers], [draw(n, r) for r, _, n in layers]
    keep = [torch.rand(r, generator=generator) < 0.6 for r, _, _ in layers] if masked else None
    exact = [[factor.double() for factor in kind] for kind in (lora_A, lora_B)]
    value, gradients = PlainKernels().orthogonality(*exact, 0.7, keep)
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
    _, gradients = PlainKernels().orthogonality(lora_A, lora_B, 1.0)
    assert gradients is not None
    torch.testing.assert_close(shared, gradients[0] + gradients[1])


def test_layout() -> None:
    layout = FactorLayout.of([(3, 5, 7), (0, 4, 2), (1, 16, 16)])
    assert layout.ranks == (3, 0, 1)
    assert layout.rank_offsets == (0, 3, 3)
    assert layout.total_rank == 4
    assert layout.shapes[:3] == ((3, 5), (7, 3), (3, 1))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    flat = torch.full((layout.numel,), -1.0)
    views = layout.views(flat)
    assert [tuple(view.shape) for view in views] == list(layout.shapes)
    for index, view in enumerate(views):
        view.fill_(index)
    written = sum(rows * columns for rows, columns in layout.shapes)
    assert int((flat >= 0).sum()) == written, "views overlap"


def test_an_implementation_is_served_or_refused() -> None:
    assert kernels_for(CPU, torch.float32, "plain").name == "plain"
    with pytest.raises(ValueError, match="impl: found 'fast', expected one of auto, plain"):
        kernels_for(CPU, torch.float32, "fast")
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: it runs on the CPU, found meta"):
        kernels_for(torch.device("meta"), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"its averages are float32 or float64, found torch\.float16"):
        kernels_for(CPU, torch.float16, "cpu")
    available = cpu_allocation.refusal(CPU, torch.float32) is None
    assert kernels_for(CPU, torch.float32).name == ("cpu" if available else "plain")
    assert kernels_for(torch.device("meta"), torch.float32).name == "plain"


def test_shapes_and_dtypes_are_checked_before_anything_is_written(kernels: AllocationKernels) -> None:
    problem = _problem([(5, 30, 9), (4, 8, 8)])
    for index, wrong in ((3, torch.zeros(5, 8)), (5, torch.zeros(4, 1, dtype=torch.int32))):
        parameters = list(problem.parameters)
        parameters[index] = wrong
        before = problem.sensitivity.clone()
        with pytest.raises((ValueError, TypeError), match=r"parameters: found .*expected"):
            kernels.update_averages(
                problem.layout, parameters, problem.gradients, problem.sensitivity, problem.uncertainty, 0.5, 0.5
            )
        assert torch.equal(problem.sensitivity, before)


def test_operators_keep_to_their_schemas() -> None:
    """What they write, what they return, and that their fakes tell its shapes."""
    reason = cpu_allocation.refusal(CPU, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    operators = torch.ops.peftkernels
    problem = _problem([(5, 30, 9), (4, 8, 8)])
    layout = problem.layout
    table = torch.tensor([(offset, *shape) for offset, shape in zip(layout.offsets, layout.shapes, strict=True)])
    averages = (problem.sensitivity, problem.uncertainty)
    lora_A, lora_B, gates = (problem.parameters[kind::3] for kind in range(3))
    plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r in layout.ranks]
    plan_tensors = [[getattr(plan, name) for plan in plans] for name in ("state", "order", "counts")]
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (operators.allocation_averages.cpu, (problem.parameters, problem.gradients, table, *averages, 0.8, 0.9, None)),
        (operators.allocation_mask.cpu, (torch.rand(9) < 0.5, None, gates, *plan_tensors, 1)),
        (operators.allocation_orthogonality.cpu, (lora_A, lora_B, 0.5, [], [], 1.0, True)),
        (operators.allocation_orthogonality.cpu, (lora_A, lora_B, 0.5, [], [*lora_A, *lora_B], 1.0, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)
    torch.library.opcheck(operators.allocation_scores.cpu, (table, *averages), test_utils=("test_schema",))
