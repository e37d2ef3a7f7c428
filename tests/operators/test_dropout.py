"""Counter-based dropout: the published generator, one mask for one seed, and on the adapter's input alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import philox
from support.cases import DTYPES, make_call, run
from support.checks import drops_as_philox_says, within_budget
from support.implementations import ALL, examples, skip_unless_served
from torch import Tensor

from peftkernels import lora_linear
from peftkernels.ops import reference

ONES = 0xFFFFFFFF
# counter, key, result: kat_vectors of Random123 for philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -1, -(2**31), -(2**63)]


def _tensors(words: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([word], dtype=torch.int64) for word in words)


def _dropped(x: Tensor, p: float, seed: int | Tensor | None, impl: str) -> Tensor:
    """drop(x), read off a call with W = 0, A = B = 1."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    zeros = torch.zeros_like(identity)
    return lora_linear(x, zeros, identity, identity, dropout_p=p, dropout_seed=seed, impl=impl)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "digits_of_pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox.philox4x32_10(counter, key) == words
    found = reference.philox4x32_10(_tensors(counter), _tensors(key))
    assert tuple(int(word) for word in found) == words


@given(
    counter=st.tuples(*[st.integers(0, ONES)] * 4),
    key=st.tuples(*[st.integers(0, ONES)] * 2),
)
def test_the_reference_generator_is_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    found = reference.philox4x32_10(_tensors(counter), _tensors(key))
    assert tuple(int(word) for word in found) == philox.philox4x32_10(counter, key)


@pytest.mark.parametrize("dropout_seed", SEEDS)
def test_any_seed_gives_philox_bits(impl: str, dropout_seed: int) -> None:
    drops_as_philox_says(impl, dropout_seed, 0.5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("leading", "k"),
    [((1,), 1), ((5,), 3), ((3,), 64), ((130,), 130), ((2, 65), 140), ((2, 3, 4), 30), ((300,), 20), ((), 9)],
    ids=str,
)
def test_the_mask_is_the_same_for_any_shape(impl: str, leading: tuple[int, ...], k: int, dtype: str, seed: int) -> None:
    """Shapes that end inside, at and past the blocks that kernels work on: 128 and 256 rows, 64 columns."""
    skip_unless_served(impl, dtype)
    drops_as_philox_says(impl, seed, 0.3, leading, k, dtype)


@pytest.mark.parametrize("name", ALL)
def test_the_mask_is_philox_for_any_call(name: str) -> None:
    skip_unless_served(name)

    @settings(max_examples=examples(name, 30))
    @given(
        seed=st.integers(-(2**63), 2**63 - 1),
        p=st.floats(0.001, 0.999),
        rows=st.integers(1, 20),
        k=st.integers(1, 40),
    )
    def check(seed: int, p: float, rows: int, k: int) -> None:
        drops_as_philox_says(name, seed, p, (rows,), k)

    check()


@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded", "offset"])
def test_the_mask_does_not_depend_on_strides(impl: str, layout: str, seed: int) -> None:
    values = torch.randn(12, 18)
    x = {
        "transposed": torch.randn(9, 6).T,
        "every_second": values[::2, ::2],
        "expanded": values[0, :9].expand(6, 9),
        "offset": values[3:9, 5:14],
    }[layout]
    assert torch.equal(_dropped(x, 0.5, seed, impl), _dropped(x.contiguous(), 0.5, seed, impl))
    assert torch.equal(_dropped(x, 0.5, seed, impl), torch.where(philox.kept(seed, 0.5, 6, 9), 2 * x, 0))


def test_the_mask_depends_on_the_flat_index_alone(impl: str, seed: int) -> None:
    x = torch.ones(4, 30)
    flat = _dropped(x, 0.4, seed, impl).reshape(-1)
    for shape in ((120, 1), (8, 15), (2, 3, 20), (120,), (1, 1, 1, 120)):
        assert torch.equal(_dropped(x.reshape(shape), 0.4, seed, impl).reshape(-1), flat), shape


def test_the_kept_share_is_right(impl: str) -> None:
    """Within six standard deviations of the binomial, for a fixed seed; kept elements are scaled by 1/(1-p)."""
    count = 256 * 100
    for p in (0.05, 0.1, 0.5, 0.9):
        dropped = _dropped(torch.ones(256, 100), p, 1234, impl)
        share = float((dropped != 0).double().mean())
        assert abs(share - (1 - p)) < 6 * math.sqrt(p * (1 - p) / count), f"p={p}: {share} of {count} kept"
        assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p), dtype=torch.float64).float())}


def test_neighbours_are_independent(impl: str) -> None:
    """No correlation between an element and the next, the next row, and the same element under the next seed."""
    kept = (_dropped(torch.ones(256, 100), 0.5, 99, impl) != 0).double() - 0.5
    other = (_dropped(torch.ones(256, 100), 0.5, 100, impl) != 0).double() - 0.5
    for name, product in {
        "next element": kept[:, 1:] * kept[:, :-1],
        "next row": kept[1:] * kept[:-1],
        "next seed": kept * other,
    }.items():
        assert abs(float(product.mean()) * 4) < 6 / math.sqrt(product.numel()), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_p_of_one_gives_zeros(impl: str, dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(140,), n=70, k=80, dropout_p=1.0, dtype=dtype)
    outcome = run(call, impl)
    frozen = run(call.replace(lora_A=call.lora_A[:0], lora_B=call.lora_B[:, :0], gate=None, dropout_p=0.0), impl)
    for name in ("lora_A", "lora_B", "gate"):
        assert not outcome.gradients[name].any(), f"∂{name}"
    assert torch.equal(outcome.y, frozen.y)
    assert torch.equal(outcome.gradients["x"], frozen.gradients["x"])


@pytest.mark.parametrize("p", [1e-300, 1e-12, 2**-33])
def test_a_tiny_p_drops_nothing(impl: str, p: float, seed: int) -> None:
    x = torch.randn(40, 50)
    assert torch.equal(_dropped(x, p, seed, impl), x)
    within_budget(make_call(seed, dropout_p=p), impl)


def test_p_next_to_one_drops_everything(impl: str, seed: int) -> None:
    assert not _dropped(torch.ones(40, 50), 1 - 2**-40, seed, impl).any()


def test_p_of_zero_ignores_the_seed(impl: str, seed: int) -> None:
    call = make_call(seed)
    plain, seeded = run(call, impl).named(), run(call.replace(dropout_seed=7), impl).named()
    for name, expected in plain.items():
        assert torch.equal(seeded[name], expected), name


def test_the_frozen_product_is_never_dropped(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(20,))
    zero_B = torch.zeros_like(call.lora_B)
    plain = run(call.replace(lora_B=zero_B), impl)
    dropped = run(call.replace(lora_B=zero_B, dropout_p=0.7, dropout_seed=3), impl)
    assert torch.equal(dropped.y, plain.y)
    assert torch.equal(dropped.gradients["x"], plain.gradients["x"])


def test_a_seed_may_be_a_tensor(impl: str, seed: int) -> None:
    x = torch.randn(6, 8)
    for value in SEEDS:
        as_tensor = _dropped(x, 0.5, torch.tensor(value, dtype=torch.int64), impl)
        assert torch.equal(as_tensor, _dropped(x, 0.5, value, impl)), value


def test_drawn_seeds_follow_the_generator(impl: str) -> None:
    x = torch.ones(32, 32)
    torch.manual_seed(5)
    first, second = _dropped(x, 0.5, None, impl), _dropped(x, 0.5, None, impl)
    torch.manual_seed(5)
    assert torch.equal(_dropped(x, 0.5, None, impl), first)
    assert torch.equal(_dropped(x, 0.5, None, impl), second)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(_dropped(x, 0.5, None, impl), first)


def test_backward_uses_the_drawn_seed(impl: str) -> None:
    x = torch.ones(16, 16, requires_grad=True)
    y = _dropped(x, 0.5, None, impl)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(("p", "given_seed"), [(0.0, None), (0.5, 1)], ids=["no_dropout", "seed_given"])
def test_the_generator_is_left_alone(impl: str, p: float, given_seed: int | None) -> None:
    before = torch.random.get_rng_state()
    _dropped(torch.ones(4, 4), p, given_seed, impl)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_implementations_share_one_mask(impl: str, dtype: str, seed: int) -> None:
    x = torch.randn(150, 70).to(DTYPES[dtype][0])
    expected = _dropped(x.cpu(), 0.35, seed, "reference").to(x.device)
    found = _dropped(x, 0.35, seed, impl)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected)
