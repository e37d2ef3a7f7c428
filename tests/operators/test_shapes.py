"""Any M, N, K, r, any number of dimensions, any strides of x, G, the weight and the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import Call, make_call, run
from support.checks import within_budget
from support.implementations import ALL, examples, interpreted, served, skip_unless_served
from support.oracle import Budget
from torch import Tensor

from peftkernels import lora_linear

# Ones, primes, odd numbers, and the neighbours of the kernels' block sizes.
rows = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 31, 61, 127, 128, 129, 257]) | st.integers(0, 300)
# The same where blocks are of 16 and 32 rows.
rows_interpreted = st.sampled_from([0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 61, 64, 65]) | st.integers(0, 80)
widths = st.sampled_from([1, 2, 3, 13, 63, 64, 65, 97, 127, 129, 191]) | st.integers(1, 200)
depths = st.sampled_from([1, 2, 3, 5, 31, 127, 767, 768, 769, 1537]) | st.integers(1, 200)
ranks = st.sampled_from([0, 1, 2, 3, 5, 7, 12, 16, 31, 64, 127, 320]) | st.integers(0, 320)
seeds = st.integers(0, 2**32 - 1)
DTYPES = ("fp32", "fp32", "bf16", "bf16-fp32_factors", "fp16-fp32_factors")


@st.composite
def leading_dimensions(draw: st.DrawFn, rows: st.SearchStrategy[int]) -> tuple[int, ...]:
    """What precedes K: nothing (x of one dimension) to three dimensions."""
    count = draw(st.integers(0, 3))
    if count == 0:
        return ()
    if count == 1:
        return (draw(rows),)
    return tuple(draw(st.integers(0, 7)) for _ in range(count))


@pytest.mark.parametrize("name", ALL)
def test_any_shape(name: str) -> None:
    skip_unless_served(name)

    @settings(max_examples=examples(name, 150))
    @given(
        leading=leading_dimensions(rows_interpreted if interpreted(name) else rows),
        n=widths,
        k=depths,
        r=ranks,
        dtype=st.sampled_from(served(name, DTYPES)),
        options=st.fixed_dictionaries(
            {
                "bias": st.booleans(),
                "gate": st.booleans(),
                "plan": st.booleans(),
                "scaling": st.sampled_from([1.0, -0.25, "tensor"]),
                "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.6]),
            }
        ),
        seed=seeds,
    )
    def check(leading: tuple[int, ...], n: int, k: int, r: int, dtype: str, options: dict[str, Any], seed: int) -> None:
        within_budget(make_call(seed, leading=leading, n=n, k=k, r=r, dtype=dtype, **options), name)

    check()


def _strided(value: Tensor, kind: str) -> Tensor:
    """The same values with other strides (for "expanded": the first row repeated)."""
    if kind == "contiguous":
        return value
    if kind == "transposed":
        return value.transpose(-1, 0).contiguous().transpose(-1, 0)
    if kind == "every_second":
        return value.repeat_interleave(2, -1)[..., ::2]
    if kind == "row_padded":
        return torch.cat((value, value), -1)[..., : value.shape[-1]]
    if kind == "offset":
        return torch.cat((value.new_zeros(3), value.reshape(-1)))[3:].view(value.shape)
    if kind == "expanded_rows":
        return value[:1].expand(value.shape) if value.shape[0] else value
    if kind == "expanded_everywhere":
        return value.reshape(-1)[:1].expand(value.shape) if value.numel() else value
    raise ValueError(kind)


KINDS = ("contiguous", "transposed", "every_second", "row_padded", "offset", "expanded_rows")
STRIDED = ("x", "weight", "lora_A", "lora_B", "grad_y")
# Where both factors of a sum's terms repeat, all its roundings may err in one direction, by n/4·eps of the sum over n
# terms, and the band's √n, which counts on chance, holds only to n = 28. So only x may be one number everywhere, and
# G's rows, whose sum is ∂bias, repeat only in small calls and where those of x do not.
MOST_REPEATED_ROWS = 28
kinds = {name: st.sampled_from(KINDS) for name in STRIDED}
kinds["x"] = st.sampled_from((*KINDS, "expanded_everywhere"))


def _assert_within_budget_and_equal_bits(call: Call, impl: str, strided: dict[str, Tensor]) -> None:
    """Strides change no bit of what the same values give when contiguous (matmul libraries may choose by strides)."""
    changed = call.replace(**strided)
    budget = Budget(changed)
    found = run(changed, impl)
    excesses = budget.excesses(found)
    assert not excesses, f"{impl}, {call.label}: {excesses[0]}"
    if impl == "cpu":
        packed = run(changed.replace(**{name: value.contiguous() for name, value in strided.items()}), impl).named()
        for name, value in found.named().items():
            assert torch.equal(value, packed[name]), f"{impl}, {call.label}, {name}"


@pytest.mark.parametrize("name", ALL)
def test_any_strides(name: str) -> None:
    skip_unless_served(name)

    @settings(max_examples=examples(name, 120))
    @given(
        leading=st.sampled_from([(1,), (2,), (5,), (131,), (3, 4), (2, 3, 5), (1, 1)]),
        n=st.sampled_from([1, 3, 65, 130]),
        k=st.sampled_from([1, 4, 65, 770]),
        r=st.sampled_from([1, 2, 9, 33]),
        of=st.fixed_dictionaries(kinds),
        dtype=st.sampled_from(served(name, DTYPES)),
        p=st.sampled_from([0.0, 0.4]),
        plan=st.booleans(),
        seed=seeds,
    )
    @example((3, 4), 65, 65, 9, dict.fromkeys(STRIDED, "transposed"), "fp32", 0.0, False, 1)
    def check(
        leading: tuple[int, ...],
        n: int,
        k: int,
        r: int,
        of: dict[str, str],
        dtype: str,
        p: float,
        plan: bool,
        seed: int,
    ) -> None:
        call = make_call(seed, leading=leading, n=n, k=k, r=r, dtype=dtype, dropout_p=p, plan=plan)
        strided = {argument: _strided(getattr(call, argument), kind) for argument, kind in of.items()}
        many = call.x.shape[:-1].numel() > MOST_REPEATED_ROWS
        if of["grad_y"] == "expanded_rows" and (many or of["x"].startswith("expanded")):
            strided["grad_y"] = call.grad_y
        _assert_within_budget_and_equal_bits(call, name, strided)

    check()


@pytest.mark.parametrize("reduction", ["sum", "mean", "first_row", "last_column"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gradients_of_reductions(impl: str, reduction: str, dtype: str, seed: int) -> None:
    """What autograd hands back here has stride 0, or is zero almost everywhere."""
    call = make_call(seed, leading=(3, MOST_REPEATED_ROWS // 3), n=66, k=70, r=5, dtype=dtype)
    reduce = {
        "sum": lambda y: y.sum(),
        "mean": lambda y: y.mean(),
        "first_row": lambda y: y[0, 0].sum(),
        "last_column": lambda y: y[..., -1].sum(),
    }[reduction]
    y = torch.zeros_like(call.grad_y, requires_grad=True)
    reduce(y).backward()
    assert y.grad is not None
    leaves = {name: value.clone().requires_grad_(name != "weight") for name, value in call.tensors().items()}
    keywords = {**call.optional, "bias": leaves["bias"], "gate": leaves["gate"]}
    found = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)
    reduce(found).backward()
    expected = run(call.replace(grad_y=y.grad), impl)
    within_budget(call.replace(grad_y=y.grad), impl)
    for name, gradient in expected.gradients.items():
        if name != "weight":
            assert torch.equal(leaves[name].grad, gradient), name


@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0), (2, 0, 2)], ids=str)
def test_no_rows(impl: str, leading: tuple[int, ...], seed: int) -> None:
    """M = 0: an empty y, an empty ∂x, and gradients of zeros."""
    outcome = run(make_call(seed, leading=leading, plan=True), impl)
    assert outcome.y.shape == (*leading, 33)
    assert outcome.gradients["x"].shape == (*leading, 29)
    for name in ("lora_A", "lora_B", "bias", "gate"):
        assert not outcome.gradients[name].any(), name


@pytest.mark.parametrize(("n", "k", "r"), [(0, 5, 2), (5, 0, 2), (5, 4, 0), (0, 0, 0), (0, 5, 0), (5, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_empty_dimensions(impl: str, n: int, k: int, r: int, dtype: str, p: float, seed: int) -> None:
    """N = 0, K = 0 and r = 0 are served: what is left of the formula is what comes out."""
    within_budget(make_call(seed, leading=(6,), n=n, k=k, r=r, dtype=dtype, dropout_p=p), impl)


def test_rank_zero_is_the_frozen_layer(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(9,), r=0)
    expected = torch.nn.functional.linear(call.x.double(), call.weight.double(), call.bias.double())
    torch.testing.assert_close(run(call, impl).y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_outputs_are_contiguous_and_share_no_memory(impl: str, dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(4, 5), dtype=dtype)
    call = call.replace(x=_strided(call.x, "transposed"), grad_y=_strided(call.grad_y, "expanded_rows"))
    leaves = {name: value.requires_grad_(name != "weight") for name, value in call.tensors().items()}
    y = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl, **call.optional)
    trained = [value for value in leaves.values() if value.requires_grad]
    inputs = {value.untyped_storage().data_ptr() for value in (*leaves.values(), call.grad_y)}
    for value in (y, *torch.autograd.grad(y, trained, call.grad_y)):
        assert value.is_contiguous()
        assert value.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "gate", "scaling"])
def test_views_whose_memory_is_negated(impl: str, name: str, seed: int) -> None:
    """The imaginary part of a conjugate has the numbers of another tensor with the other sign: kernels must see it."""
    call = make_call(seed, scaling="tensor")
    negated = call.replace(**{name: torch._neg_view(getattr(call, name))})
    expected = run(call.replace(**{name: -getattr(call, name)}), impl).named()
    for result, value in run(negated, impl).named().items():
        assert torch.equal(value, expected[result]), f"{impl}, {result} with a negated view as {name}"
