"""Every implementation of the allocation kernels beside the eager one: averages, scores, layout, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from kernel_problems import BETA1, BETA2, CPU, ON_THE_CPU, Problem, drawn, make_problem, problems, served
from torch import Tensor

from peftkernels import RankPlan
from peftkernels.backends import registry
from peftkernels.backends.eager.allocation import EagerKernels
from peftkernels.backends.registry import kernels_for
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import ALIGNMENT, FactorLayout


def _check_averages(kernels: AllocationKernels, problem: Problem) -> None:
    """Equal to eager to the bit, whatever is done with the update."""
    finite, sensitivity, uncertainty = problem.update(EagerKernels())
    assert bool(finite)
    found = problem.update(kernels)
    assert found[0].shape == () and found[0].dtype == torch.bool and bool(found[0])
    assert torch.equal(found[1], sensitivity)
    assert torch.equal(found[2], uncertainty)


@drawn
@given(problem=problems)
def test_averages_and_scores_equal_plain_to_the_bit(kernels: AllocationKernels, problem: Problem) -> None:
    _check_averages(kernels, problem)
    _, sensitivity, uncertainty = problem.update(kernels)
    scores = kernels.rank_scores(problem.layout, sensitivity, uncertainty)
    assert torch.equal(scores, EagerKernels().rank_scores(problem.layout, sensitivity, uncertainty))
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
    problem = make_problem([(1, 40000, 9), (12, 3072, 768), (2, 7, 33000), (0, 5, 5), (100, 700, 1111), (1, 3, 33333)])
    torch.set_num_threads(threads)
    _check_averages(kernels, problem)
    for _ in range(2):
        # The second time, the update has the scores ready.
        _, sensitivity, uncertainty = problem.update(kernels)
        scores = kernels.rank_scores(problem.layout, sensitivity, uncertainty)
        assert torch.equal(scores, _scores_factor_by_factor(problem.layout, sensitivity, uncertainty))


def test_scores_of_freed_averages_are_nobody_elses(kernels: AllocationKernels) -> None:
    """New averages get the memory, and the versions, of those that were freed."""
    problem = make_problem([(5, 30, 9)])
    for turn in range(6):
        made = [tensor.clone().add_(turn) for tensor in (problem.sensitivity, problem.uncertainty)]
        found = kernels.rank_scores(problem.layout, *made)
        assert torch.equal(found, EagerKernels().rank_scores(problem.layout, *made))
        kernels.update_averages(problem.layout, problem.parameters, problem.gradients, *made, BETA1, BETA2)
        versions = [tensor._version for tensor in made]
        del made, found
        others = [torch.ones_like(problem.sensitivity), torch.ones_like(problem.uncertainty)]
        for tensor, version in zip(others, versions, strict=True):
            for _ in range(version):
                tensor.add_(0.0)
        found = kernels.rank_scores(problem.layout, *others)
        assert torch.equal(found, EagerKernels().rank_scores(problem.layout, *others))
        del others, found


def test_scores_belong_to_the_averages_as_they_are(kernels: AllocationKernels) -> None:
    """Also where an update has them ready: after every kind of step, and where averages were written from outside."""
    problem = make_problem([(5, 300, 9), (12, 33, 70)])
    sensitivity, uncertainty = problem.sensitivity.clone(), problem.uncertainty.clone()

    def check() -> Tensor:
        found = kernels.rank_scores(problem.layout, sensitivity, uncertainty)
        assert torch.equal(found, EagerKernels().rank_scores(problem.layout, sensitivity, uncertainty))
        return found

    def update(skip: bool = False) -> None:
        kernels.update_averages(
            problem.layout, problem.parameters, problem.gradients, sensitivity, uncertainty, BETA1, BETA2,
            torch.tensor(skip),
        )  # fmt: skip

    seen = [check()]
    for skip in (False, False, True, False):
        update(skip)
        seen.append(check())
        check().fill_(-1.0)
        check()
    assert not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    sensitivity.mul_(2)
    check()
    update()
    update()
    check()
    update()
    problem.layout.views(uncertainty)[0].zero_()
    check()
    other = make_problem([(5, 300, 9), (12, 33, 70)], seed=9)
    found = kernels.rank_scores(other.layout, other.sensitivity, other.uncertainty)
    assert torch.equal(found, EagerKernels().rank_scores(other.layout, other.sensitivity, other.uncertainty))
    check()


class _FusedMultiplyAdd(EagerKernels):
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


class _SwappedBetas(EagerKernels):
    name = "swapped"

    def update_averages(
        self, layout: Any, parameters: Any, gradients: Any, sensitivity: Any, uncertainty: Any, *rest: Any
    ) -> Tensor:
        beta1, beta2, skip = rest
        return super().update_averages(layout, parameters, gradients, sensitivity, uncertainty, beta2, beta1, skip)


@pytest.mark.parametrize("fault", [_FusedMultiplyAdd, _SwappedBetas])
def test_faults_are_caught(fault: type[EagerKernels]) -> None:
    problem = make_problem([(12, 65, 31)])
    _check_averages(EagerKernels(), problem)
    with pytest.raises(AssertionError):
        _check_averages(fault(), problem)


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("where", ["parameters", "gradients"])
@pytest.mark.parametrize("index", [0, 4, 8])
def test_what_is_not_finite_leaves_every_bit(impl: str, bad: float, where: str, index: int) -> None:
    """The first factor and the last: whatever was read before it is not written."""
    kernels = served(impl)
    problem = make_problem([(5, 1030, 9), (3, 7, 5), (12, 33, 1100)])
    tensor = getattr(problem, where)[index]
    tensor.view(-1)[-1] = bad
    if bad == 1e38:
        # Two finite numbers whose product is not.
        problem.parameters[index].view(-1)[-1] = problem.gradients[index].view(-1)[-1] = bad
    finite, sensitivity, uncertainty = problem.update(kernels)
    assert not bool(finite)
    assert torch.equal(sensitivity, problem.sensitivity)
    assert torch.equal(uncertainty, problem.uncertainty)


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_skip_leaves_every_bit_and_tells_whether_all_was_finite(impl: str) -> None:
    kernels = served(impl)
    problem = make_problem([(5, 30, 9)])
    finite, sensitivity, uncertainty = problem.update(kernels, torch.tensor(True))
    assert bool(finite)
    assert torch.equal(sensitivity, problem.sensitivity)
    assert torch.equal(uncertainty, problem.uncertainty)
    finite, sensitivity, _ = problem.update(kernels, torch.tensor(False))
    assert torch.equal(sensitivity, problem.update(EagerKernels())[1])
    problem.parameters[0][0, 0] = math.nan
    assert not bool(problem.update(kernels, torch.tensor(True))[0])


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_a_missing_gradient_counts_as_zero(impl: str) -> None:
    kernels = served(impl)
    problem = make_problem([(5, 30, 9), (4, 8, 8)])
    problem.gradients[1] = None
    without = problem.update(kernels)
    problem.gradients[1] = torch.zeros_like(problem.parameters[1])
    with_zero = problem.update(kernels)
    assert all(torch.equal(one, other) for one, other in zip(without, with_zero, strict=True))
    assert not torch.equal(without[1], problem.sensitivity)


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
    assert kernels_for(CPU, torch.float32, "eager").name == "eager"
    with pytest.raises(ValueError, match="impl: found 'fast', expected one of auto, eager"):
        kernels_for(CPU, torch.float32, "fast")
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: it runs on the CPU, found meta"):
        kernels_for(torch.device("meta"), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"its averages are float32 or float64, found torch\.float16"):
        kernels_for(CPU, torch.float16, "cpu")
    available = registry.backend_status()["cpu"] is None
    assert kernels_for(CPU, torch.float32).name == ("cpu" if available else "eager")
    assert kernels_for(torch.device("meta"), torch.float32).name == "eager"


def test_shapes_and_dtypes_are_checked_before_anything_is_written(kernels: AllocationKernels) -> None:
    problem = make_problem([(5, 30, 9), (4, 8, 8)])
    for index, wrong in ((3, torch.zeros(5, 8)), (5, torch.zeros(4, 1, dtype=torch.int32))):
        parameters = list(problem.parameters)
        parameters[index] = wrong
        before = problem.sensitivity.clone()
        with pytest.raises((ValueError, TypeError), match=r"parameters(\[\d\])?: found .*expected"):
            kernels.update_averages(
                problem.layout, parameters, problem.gradients, problem.sensitivity, problem.uncertainty, 0.5, 0.5
            )
        assert torch.equal(problem.sensitivity, before)


def test_operators_keep_to_their_schemas() -> None:
    """What they write, what they return, and that their fakes tell its shapes."""
    reason = registry.backend_status()["cpu"]
    if reason is not None:
        pytest.skip(reason)
    operators = torch.ops.peftkernels
    problem = make_problem([(5, 30, 9), (4, 8, 8)])
    layout = problem.layout
    table = torch.tensor([(offset, *shape) for offset, shape in zip(layout.offsets, layout.shapes, strict=True)])
    averages = (problem.sensitivity, problem.uncertainty)
    lora_A, lora_B, gates = (problem.parameters[kind::3] for kind in range(3))
    plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r in layout.ranks]
    plan_tensors = [[getattr(plan, name) for plan in plans] for name in ("state", "order", "counts")]
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (
            operators.allocation_averages.cpu,
            (problem.parameters, problem.gradients, table, *averages, 0.8, 0.9, None, False),
        ),
        (operators.allocation_mask.cpu, (torch.rand(9) < 0.5, None, gates, *plan_tensors, 1)),
        (operators.allocation_orthogonality.cpu, (lora_A, lora_B, 0.5, [], [], 1.0, True)),
        (operators.allocation_orthogonality.cpu, (lora_A, lora_B, 0.5, [], [*lora_A, *lora_B], 1.0, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)
    torch.library.opcheck(operators.allocation_scores.cpu, (table, *averages), test_utils=("test_schema",))
