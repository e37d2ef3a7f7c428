"""Rank allocation in Triton kernels beside plain tensor code, where they are interpreted as well as on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from support.devices import device_of
from support.implementations import skip_unless_served
from support.memory import poison
from support.orthogonality_error import added_error, assert_within, term_errors
from torch import Tensor, nn

from peftkernels import RankPlan, RankState
from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.kernels import FactorLayout, kernels_for
from peftkernels.allocation.kernels.plain import PlainKernels
from peftkernels.allocation.selection import select_ranks
from peftkernels.allocation.strategies import Magnitude
from peftkernels.backends.triton import allocation, launch
from peftkernels.backends.triton.allocation.addresses import Addresses
from peftkernels.nn import AdaLoRALinear

BETA1, BETA2 = 0.85, 0.8
# (r, K, N) of every layer. Ranks and widths that tiles end inside of, and some that come four at a time.
LAYERS: dict[str, list[tuple[int, int, int]]] = {
    "r12": [(12, 520, 136), (12, 64, 20)],
    "odd": [(1, 7, 9), (33, 65, 31), (5, 515, 1)],
    "r0_and_r40": [(0, 6, 5), (40, 12, 20)],
}
in_every_layout = pytest.mark.parametrize("layers", LAYERS)
in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture
def device() -> torch.device:
    skip_unless_served("triton")
    return device_of("triton")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    skip_unless_served("triton")
    with poison(device_of("triton")):
        yield


@dataclass
class Averages:
    """A layout with factors, and averages as some steps leave them; every draw is another."""

    layout: FactorLayout
    parameters: list[Tensor]
    sensitivity: Tensor
    uncertainty: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, layers: str, dtypes: Sequence[torch.dtype], device: torch.device, seed: int) -> Averages:
        layout = FactorLayout.of(LAYERS[layers])
        generator = torch.Generator().manual_seed(seed)
        shaped = enumerate(layout.shapes)
        parameters = [torch.randn(shape, generator=generator).to(device, dtypes[i % 3]) for i, shape in shaped]
        averages = [torch.zeros(layout.numel, device=device) for _ in range(2)]
        for average in averages:
            for view in layout.views(average):
                view.copy_(torch.rand(view.shape, generator=generator) * 1e-3)
        return cls(layout, parameters, *averages, generator)

    def gradients(self) -> list[Tensor | None]:
        return [torch.randn(p.shape, generator=self.generator).to(p) * 1e-2 for p in self.parameters]

    def copies(self) -> tuple[Tensor, Tensor]:
        return self.sensitivity.clone(), self.uncertainty.clone()


def _drawn(layers: str, device: torch.device, seed: int, *dtypes: torch.dtype) -> Averages:
    return Averages.drawn(layers, dtypes or (torch.float32,) * 3, device, seed)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


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
    kernels, plain = allocation.kernels(), PlainKernels()
    for step in range(2):
        gradients = drawn.gradients()
        if step == 1:
            gradients[4] = None
        rates = (BETA1, BETA2)
        finite = kernels.update_averages(layout, drawn.parameters, gradients, *found, *rates)
        assert finite.dtype is torch.bool and finite.shape == () and finite.device == device and bool(finite)
        plain.update_averages(layout, drawn.parameters, gradients, *expected, *rates)
        _same(found, expected)
    assert not torch.equal(found[0], drawn.sensitivity)


@pytest.mark.parametrize("fault", ["fused", "swapped"])
def test_other_roundings_and_rates_would_be_seen(fault: str, device: torch.device, seed: int) -> None:
    """What the test above compares differs where a product joins an addition, and where the rates change places."""
    drawn = _drawn("r12", device, seed)
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
    drawn = _drawn(layers, device, seed)
    found = allocation.kernels().rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)
    exact = PlainKernels().rank_scores(drawn.layout, drawn.sensitivity.double(), drawn.uncertainty.double())
    assert found.dtype is torch.float32 and found.shape == (drawn.layout.total_rank,)
    roundings = 1 + 10 + 6 + 1 + 2
    assert bool((found > 0).all())
    assert float(((found - exact).abs() / exact).max()) <= roundings * 2**-24


@in_every_dtype
def test_scores_of_an_update_are_those_of_its_averages(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Sums that the update leaves give the bits that a pass over the averages gives, also after a step not taken."""
    drawn = _drawn("odd", device, seed, *(dtype,) * 3)
    kernels, both = allocation.kernels(), drawn.copies()
    for skip in (False, True):
        skipped = torch.tensor([False, skip], device=device)[1]
        kernels.update_averages(drawn.layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2, skipped)
        with counted() as names:
            found = kernels.rank_scores(drawn.layout, *both)
        assert names == ["add_parts"]
        _same([found], [allocation.kernels().rank_scores(drawn.layout, *both)])


def test_scores_follow_averages_that_were_loaded(device: torch.device, seed: int) -> None:
    drawn = _drawn("odd", device, seed)
    kernels, both = allocation.kernels(), drawn.copies()
    kernels.update_averages(drawn.layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2)
    both[0].copy_(drawn.sensitivity)
    found = kernels.rank_scores(drawn.layout, *both)
    _same([found], [allocation.kernels().rank_scores(drawn.layout, *both)])
    # The averages of somebody else, in other tensors.
    found = kernels.rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)
    _same([found], [allocation.kernels().rank_scores(drawn.layout, drawn.sensitivity, drawn.uncertainty)])


@pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("culprit", ["inf", "nan", "overflow", "parameter_without_gradient"])
@pytest.mark.parametrize("layers", ["r12", "odd"])
def test_one_product_that_is_not_finite_leaves_the_averages(
    layers: str, culprit: str, device: torch.device, seed: int
) -> None:
    drawn = _drawn(layers, device, seed)
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
    _same(found, (drawn.sensitivity, drawn.uncertainty))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_a_skipped_step_leaves_the_averages_and_is_still_checked(
    skip: bool, finite: bool, device: torch.device, seed: int
) -> None:
    drawn = _drawn("odd", device, seed)
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
    drawn = _drawn("odd", device, seed)
    parameters = [parameter.t().contiguous().t() for parameter in drawn.parameters]
    assert not all(parameter.is_contiguous() for parameter in parameters)
    gradients = drawn.gradients()
    gradients[3] = torch.randn(65, device=device).mul_(1e-2).expand(33, 65)
    kernels, plain = allocation.kernels(), PlainKernels()
    found, expected = drawn.copies(), drawn.copies()
    for _ in range(2):
        kernels.update_averages(drawn.layout, parameters, gradients, *found, BETA1, BETA2)
        plain.update_averages(drawn.layout, parameters, gradients, *expected, BETA1, BETA2)
        _same(found, expected)
        for parameter in parameters:
            parameter.mul_(0.75)


def test_tensors_at_odd_addresses(device: torch.device, seed: int) -> None:
    """Vectors of four need multiples of 16 bytes: gradients that are parts of a bucket may lie anywhere. Same bits."""
    drawn = _drawn("r12", device, seed)
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
    _same(*scores)


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
    _same((keep, threshold), expected)
    assert int(keep.sum()) == 40000


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_the_budget_may_be_on_the_device(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    scores = _scores(50, "ties", torch.Generator().manual_seed(seed)).to(device)
    kernels = allocation.kernels()
    for budget in (-3, 0, 17, 50, 1000):
        found = kernels.select(scores, torch.tensor(budget, dtype=dtype, device=device), True)
        _same(found, select_ranks(scores, min(max(budget, 0), 50), exact=True))
        _same(kernels.select(scores, budget, True), found)


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
    for kernels in (allocation.kernels(), PlainKernels()):
        gates = [gate.clone() for gate in given]
        # One that is a column of something else.
        gates[-1] = torch.stack((gates[-1], gates[-1]), 1)[:, 1]
        plans = [RankPlan.from_state(torch.full((r,), 1, dtype=torch.uint8, device=device)) for r in layout.ranks]
        versions = [gate._version for gate in gates]
        kernels.apply(layout, keep, gates, plans, int(masked), now)
        assert all(gate._version > before for gate, before in zip(gates, versions, strict=True))
        written.append([*gates, *[getattr(plan, name) for plan in plans for name in RankPlan.__slots__]])
    _same(*written)


def _adapters(layers: str, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (torch.randn(r, k, generator=generator) * k**-0.5, torch.randn(n, r, generator=generator) * n**-0.5)
        for r, k, n in LAYERS[layers]
    ]
    return [a.to(device, dtype) for a, _ in drawn], [b.to(device, dtype) for _, b in drawn]


def _doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def _keep(layers: str, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(r, generator=generator) < 0.6).to(device) for r, _, _ in LAYERS[layers]]


@pytest.mark.parametrize("masked", [False, True])
@in_every_dtype
@in_every_layout
def test_the_orthogonality_term(layers: str, dtype: torch.dtype, masked: bool, device: torch.device, seed: int) -> None:
    """Value, gradients written and gradients added, beside float64."""
    lora_A, lora_B = _adapters(layers, dtype, device, seed)
    keep = _keep(layers, device, seed) if masked else None
    kernels = allocation.kernels()
    value, gradients = kernels.orthogonality(lora_A, lora_B, 0.5, keep)
    exact_value, exact_gradients = PlainKernels().orthogonality(_doubled(lora_A), _doubled(lora_B), 0.5, keep)
    value_error, errors = term_errors(lora_A, lora_B, 0.5, keep)
    assert value.shape == () and value.dtype is torch.float32
    assert gradients is not None and exact_gradients is not None
    assert all(gradient.dtype is torch.float32 for gradient in gradients)
    for found in zip([value, *gradients], [exact_value, *exact_gradients], [value_error, *errors], strict=True):
        assert_within(*found)
    only_value, nothing = kernels.orthogonality(lora_A, lora_B, 0.5, keep, gradients=False)
    assert torch.equal(only_value, value) and nothing is None

    before = [torch.randn_like(factor) for factor in (*lora_A, *lora_B)]
    added = [each.clone() for each in before]
    same_value, nothing = kernels.orthogonality(lora_A, lora_B, 0.5, keep, added, 3.0)
    assert torch.equal(same_value, value) and nothing is None
    for target, start, gradient, error in zip(added, before, exact_gradients, errors, strict=True):
        exact = start.double() + 3.0 * gradient
        assert_within(target, exact, added_error(error, gradient, 3.0, exact, target.dtype))


def test_adapters_of_two_dtypes_and_other_strides(device: torch.device, seed: int) -> None:
    lora_A, lora_B = _adapters("odd", torch.float32, device, seed)
    lora_A[1], lora_B[1] = lora_A[1].half(), lora_B[1].half()
    lora_B[2] = lora_B[2].t().contiguous().t()
    lora_A[2] = lora_A[2].repeat_interleave(2, 1)[:, ::2]
    kernels = allocation.kernels()
    targets = [factor.t().contiguous().t().clone() for factor in (*lora_A, *lora_B)]
    for _ in range(2):
        before = _doubled(targets)
        value, _ = kernels.orthogonality(lora_A, lora_B, 0.5, None, targets)
        exact_value, gradients = PlainKernels().orthogonality(_doubled(lora_A), _doubled(lora_B), 0.5)
        value_error, errors = term_errors(lora_A, lora_B, 0.5, None)
        assert gradients is not None
        assert_within(value, exact_value, value_error)
        for target, start, gradient, error in zip(targets, before, gradients, errors, strict=True):
            exact = start + gradient
            assert_within(target, exact, added_error(error, gradient, 1.0, exact, target.dtype))
        lora_B[2].mul_(0.5)


def test_orthonormal_factors_have_no_gradient(device: torch.device) -> None:
    lora_A, lora_B = [torch.eye(5, 7, device=device)], [torch.eye(9, 5, device=device)]
    value, gradients = allocation.kernels().orthogonality(lora_A, lora_B, 0.5)
    assert gradients is not None and float(value) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients)


def test_ranks_that_take_no_part_may_hold_anything(device: torch.device, seed: int) -> None:
    lora_A, lora_B = _adapters("odd", torch.float32, device, seed)
    keep = _keep("odd", device, seed)
    kernels = allocation.kernels()
    value, gradients = kernels.orthogonality(lora_A, lora_B, 0.5, keep)
    for a, b, kept in zip(lora_A, lora_B, keep, strict=True):
        a[~kept], b[:, ~kept] = torch.nan, torch.inf
    other_value, others = kernels.orthogonality(lora_A, lora_B, 0.5, keep)
    assert gradients is not None and others is not None
    _same([value, *gradients], [other_value, *others])


class counted:
    """In the block, which kernels are launched, by name; full: with what sets a form apart."""

    def __init__(self, full: bool = False) -> None:
        self._full = full

    def __enter__(self) -> list[str]:
        names: list[str] = []
        call = self._call = launch.Variant.__call__
        full = self._full

        def spy(variant: launch.Variant, programs: int, *arguments: object) -> None:
            names.append(variant.name if full else variant.function.__name__)
            call(variant, programs, *arguments)

        launch.Variant.__call__ = spy  # type: ignore[method-assign]
        return names

    def __exit__(self, *_: object) -> None:
        launch.Variant.__call__ = self._call  # type: ignore[method-assign]


def test_a_step_takes_seven_launches(device: torch.device, seed: int) -> None:
    """Whatever the number of layers; setting the flag of the check is a launch of the library."""
    for layers in ("r12", "odd"):
        drawn = _drawn(layers, device, seed)
        layout, kernels = drawn.layout, allocation.kernels()
        both = drawn.copies()
        gates, lora_A, lora_B = (drawn.parameters[kind::3] for kind in (2, 0, 1))
        plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device)) for r in layout.ranks]
        with counted() as names:
            kernels.update_averages(layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2)
            keep, _ = kernels.select(kernels.rank_scores(layout, *both), layout.total_rank // 2, False)
            kernels.apply(layout, keep, gates, plans, int(RankState.PROBE))
            kernels.orthogonality(lora_A, lora_B, 0.5, None, [torch.zeros_like(each) for each in (*lora_A, *lora_B)])
        assert names == [
            "check_finite", "update_averages", "add_parts", "keep_above_threshold", "write_masks", "gram_matrices",
            "add_gradients",
        ]  # fmt: skip


def _every_call(drawn: Averages, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each function that reads tables of addresses, on one object."""
    kernels, layout = allocation.kernels(), drawn.layout
    gradients = drawn.gradients()
    plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device)) for r in layout.ranks]
    keep = torch.ones(layout.total_rank, dtype=torch.bool, device=device)
    averages = (drawn.sensitivity, drawn.uncertainty)
    lora_A, lora_B, gates = (drawn.parameters[kind::3] for kind in range(3))
    return {
        "update_averages": lambda: kernels.update_averages(
            layout, drawn.parameters, gradients, *averages, BETA1, BETA2
        ),
        "apply": lambda: kernels.apply(layout, keep, gates, plans, int(RankState.PROBE)),
        "orthogonality": lambda: kernels.orthogonality(lora_A, lora_B, 0.5),
    }


def test_tables_are_sent_once_while_tensors_stay(
    device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = _drawn("odd", device, seed)
    calls = _every_call(drawn, device)
    for call in calls.values():
        call()
    for name in ("addresses", "parts", "term", "implementation"):
        module = f"peftkernels.backends.triton.allocation.{name}.sent"
        monkeypatch.setattr(module, lambda *_: pytest.fail("a table was sent again"))
    for call in calls.values():
        call()
    drawn.parameters[0] = drawn.parameters[0].clone()
    with pytest.raises(pytest.fail.Exception, match="sent again"):
        calls["update_averages"]()


def test_an_allocator_sends_the_tables_of_its_term_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the term is asked for, and however often."""
    layers = {name: AdaLoRALinear.from_linear(nn.Linear(6, 5), 3).to(device) for name in ("first", "second")}
    allocator = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=1, orth_reg_weight=0.5, impl="triton")
    transfers = []
    for name in ("addresses", "parts", "term", "implementation"):
        module = f"peftkernels.backends.triton.allocation.{name}"
        send = importlib.import_module(module).sent
        monkeypatch.setattr(f"{module}.sent", lambda *given, send=send: transfers.append(given) or send(*given))
    term = allocator.regularization()
    term.backward()
    assert transfers
    transfers.clear()
    for _ in range(2):
        assert torch.equal(allocator.regularization(), term)
    assert not transfers
    allocator.add_regularization_gradient()
    transfers.clear()
    allocator.regularization()
    allocator.add_regularization_gradient()
    assert not transfers


def test_a_capture_needs_tensors_that_stay(device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table cannot be sent while a graph is captured: the first call, and tensors that moved, are refused."""
    folder = "peftkernels.backends.triton.allocation"
    modules = [f"{folder}.{name}.capturing" for name in ("smoothing", "implementation", "term")]

    def capture(yes: bool) -> None:
        for module in modules:
            monkeypatch.setattr(module, lambda device: yes)

    drawn = _drawn("odd", device, seed)
    calls = _every_call(drawn, device)
    capture(True)
    for call in calls.values():
        with pytest.raises(RuntimeError, match="make one call"):
            call()
    capture(False)
    for call in calls.values():
        call()
    capture(True)
    for call in calls.values():
        call()
    drawn.parameters[0] = drawn.parameters[0].clone()
    with pytest.raises(RuntimeError, match="the parameters lora_A, lora_B, lora_E lie elsewhere than in the last call"):
        calls["update_averages"]()


def test_a_graph_keeps_the_table_that_it_reads(device: torch.device) -> None:
    """Addresses that a graph was captured with stay in memory, and a later call has another table."""
    addresses = Addresses("tensors", lambda tensors: None)
    first, second = torch.ones(3, device=device), torch.ones(3, device=device)
    assert addresses.update([first], device, False)
    captured = addresses.table
    assert not addresses.update([first], device, True)
    assert addresses.update([second], device, False)
    assert captured.tolist() == [first.data_ptr()] and addresses.table.tolist() == [second.data_ptr()]
    assert any(kept is captured for kept in addresses.kept)


def test_what_does_not_fit_is_refused_before_any_launch(device: torch.device, seed: int) -> None:
    drawn = _drawn("odd", device, seed)
    kernels, layout, gradients = allocation.kernels(), drawn.layout, drawn.gradients()
    averages = drawn.copies()
    rates = (BETA1, BETA2)
    with counted() as names:
        # What was refused once is not known for that.
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"sensitivity: found torch.float64 \(\d+,\), expected contiguous torch.f"
            ):
                kernels.update_averages(layout, drawn.parameters, gradients, averages[0].double(), averages[1], *rates)
            with pytest.raises(ValueError, match="parameters: found 8 tensors, expected 9"):
                kernels.update_averages(layout, drawn.parameters[1:], gradients, *averages, *rates)
            doubled = [drawn.parameters[0].double(), *drawn.parameters[1:]]
            with pytest.raises(ValueError, match=r"parameters\[0\]: found torch.float64 \(1, 7\), expected float32, "):
                kernels.update_averages(layout, doubled, gradients, *averages, *rates)
            with pytest.raises(TypeError, match=r"scores: found torch.float64 \(3,\), expected float32"):
                kernels.select(torch.ones(3, dtype=torch.float64, device=device), 1, False)
            with pytest.raises(
                TypeError, match=r"lora_B\[0\]: found torch.float64, expected float32, float16 or bfloat16"
            ):
                kernels.orthogonality([drawn.parameters[0]], [drawn.parameters[1].double()], 0.5)
            targets = [torch.zeros(1, 7, device=device), torch.zeros(9, 2, device=device)]
            with pytest.raises(
                ValueError, match=r"add_to\[1\]: found torch.float32 \(9, 2\), expected torch.float32 \(9"
            ):
                kernels.orthogonality(drawn.parameters[:1], drawn.parameters[1:2], 0.5, None, targets)
            plans = [RankPlan.from_mask(torch.ones(r + 1, dtype=torch.bool, device=device)) for r in layout.ranks]
            keep = torch.ones(layout.total_rank, dtype=torch.bool, device=device)
            with pytest.raises(
                ValueError, match="layer 0: found a gate of 1 numbers and a plan of 2 ranks, expected 1"
            ):
                kernels.apply(layout, keep, drawn.parameters[2::3], plans, 1)
    assert not names
    _same(averages, (drawn.sensitivity, drawn.uncertainty))


def test_a_named_implementation_is_served_or_refused(device: torch.device) -> None:
    assert kernels_for(device, torch.float32, "triton").name == "triton"
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: averages are torch.float64"):
        kernels_for(device, torch.float64, "triton")
    elsewhere = torch.device("meta")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: averages are on meta"):
        kernels_for(elsewhere, torch.float32, "triton")
    # Interpreted kernels are for tests: nobody gets them who did not ask.
    assert (kernels_for(device, torch.float32).name == "triton") is (device.type == "cuda")
