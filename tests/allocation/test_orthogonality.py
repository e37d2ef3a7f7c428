"""The orthogonality term: value, closed-form gradient, masks, precision."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import ON_THE_CPU
from small_models import adapter_layers, draw_gradients
from torch import Tensor

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.allocation.run.orthogonality import orthogonality
from peftkernels.backends import registry

SHAPES_A = ((4, 9), (4, 9), (3, 7), (1, 5), (0, 6), (5, 3))


def _factors(dtype: torch.dtype = torch.float64, scale: float = 0.5) -> tuple[list[Tensor], list[Tensor]]:
    lora_A = [(torch.randn(shape, dtype=dtype) * scale).requires_grad_() for shape in SHAPES_A]
    lora_B = [(torch.randn(8, shape[0], dtype=dtype) * scale).requires_grad_() for shape in SHAPES_A]
    return lora_A, lora_B


def _peft_formula(lora_A: list[Tensor], lora_B: list[Tensor], weight: float) -> Tensor:
    """HF peft's AdaLoraModel.forward, one factor after the other."""
    norms = [torch.norm(a @ a.T - torch.eye(a.shape[0], dtype=a.dtype)) for a in lora_A]
    norms += [torch.norm(b.T @ b - torch.eye(b.shape[1], dtype=b.dtype)) for b in lora_B]
    return weight * sum(norms) / len(norms)


def test_value_and_gradient_equal_autograd_of_pefts_formula() -> None:
    torch.manual_seed(0)
    lora_A, lora_B = _factors()
    ours = orthogonality(lora_A, lora_B, 0.7)
    theirs = _peft_formula(lora_A, lora_B, 0.7)
    assert ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    our_gradients = torch.autograd.grad(3 * ours, lora_A + lora_B)
    # Autograd has no gradient for the norm of an empty matrix; ours is empty.
    filled = [factor for factor in lora_A + lora_B if factor.numel()]
    expected = dict(zip(map(id, filled), torch.autograd.grad(3 * theirs, filled), strict=True))
    for factor, gradient in zip(lora_A + lora_B, our_gradients, strict=True):
        torch.testing.assert_close(gradient, expected.get(id(factor), torch.zeros_like(factor)), rtol=1e-11, atol=1e-14)


def test_gradcheck() -> None:
    torch.manual_seed(1)
    lora_A, lora_B = _factors()
    count = len(lora_A)
    assert torch.autograd.gradcheck(lambda *f: orthogonality(f[:count], f[count:], 1.3), (*lora_A, *lora_B))


def test_gradcheck_with_masked_ranks() -> None:
    torch.manual_seed(2)
    lora_A, lora_B = _factors()
    keep = [torch.rand(shape[0]) < 0.6 for shape in SHAPES_A]
    count = len(lora_A)
    assert torch.autograd.gradcheck(lambda *f: orthogonality(f[:count], f[count:], 1.3, keep), (*lora_A, *lora_B))


def test_masked_equals_sliced() -> None:
    """With a mask the term is that of the kept rows and columns alone, and the others get gradient zero."""
    torch.manual_seed(3)
    lora_A, lora_B = _factors()
    keep = [torch.rand(shape[0]) < 0.6 for shape in SHAPES_A]
    masked = orthogonality(lora_A, lora_B, 1.0, keep)
    sliced = _peft_formula(
        [a[k] for a, k in zip(lora_A, keep, strict=True)], [b[:, k] for b, k in zip(lora_B, keep, strict=True)], 1.0
    )
    torch.testing.assert_close(masked, sliced, rtol=1e-13, atol=0)
    masked.backward()
    for a, b, k in zip(lora_A, lora_B, keep, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert not a.grad[~k].any()
        assert not b.grad[:, ~k].any()
        assert a.grad[k].all()


def test_gradient_is_zero_where_the_norm_is() -> None:
    lora_A = [torch.eye(3, 5).requires_grad_(), torch.full((3, 5), 0.3).requires_grad_()]
    lora_B = [torch.eye(6, 3).requires_grad_(), torch.full((6, 3), 0.3).requires_grad_()]
    term = orthogonality(lora_A, lora_B, 1.0)
    term.backward()
    for factor, is_zero in zip(lora_A + lora_B, [True, False, True, False], strict=True):
        assert factor.grad is not None
        assert torch.isfinite(factor.grad).all()
        assert bool((factor.grad == 0).all()) is is_zero


def test_nan_is_not_hidden() -> None:
    lora_A, lora_B = _factors(torch.float32)
    with torch.no_grad():
        lora_A[0][0, 0] = torch.nan
    term = orthogonality(lora_A, lora_B, 1.0)
    term.backward()
    assert term.isnan()
    assert lora_A[0].grad is not None
    assert lora_A[0].grad.isnan().any()
    assert lora_A[1].grad is not None
    assert lora_A[1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_are_summed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    lora_A, lora_B = _factors(dtype)
    term = orthogonality(lora_A, lora_B, 1.0)
    exact = _peft_formula([a.double() for a in lora_A], [b.double() for b in lora_B], 1.0)
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.double(), exact, rtol=1e-6, atol=0)
    term.backward()
    assert all(factor.grad is not None and factor.grad.dtype == dtype for factor in lora_A + lora_B)


def test_autocast_does_not_round_the_term() -> None:
    torch.manual_seed(5)
    lora_A, lora_B = _factors(torch.float32)
    plain = orthogonality(lora_A, lora_B, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = orthogonality(lora_A, lora_B, 1.0)
    assert torch.equal(plain, under_autocast)


def test_only_the_gradients_asked_for() -> None:
    lora_A, lora_B = _factors()
    for factor in lora_A:
        factor.requires_grad_(False)
    orthogonality(lora_A, lora_B, 1.0).backward()
    assert all(factor.grad is None for factor in lora_A)
    assert all(factor.grad is not None for factor in lora_B)
    with torch.no_grad():
        assert not orthogonality(lora_A, lora_B, 1.0).requires_grad


def test_double_backward_raises() -> None:
    lora_A, lora_B = _factors()
    factors = [factor for factor in lora_A + lora_B if factor.numel()]
    gradients = torch.autograd.grad(orthogonality(lora_A, lora_B, 1.0), factors, create_graph=True)
    for factor, gradient in zip(factors, gradients, strict=True):
        with pytest.raises(RuntimeError, match="double backward is not implemented"):
            torch.autograd.grad(gradient.sum() + factor.sum(), factor, retain_graph=True)


def test_allocator_term_has_weight_and_zero_weight_is_free() -> None:
    torch.manual_seed(6)
    layers = adapter_layers((8, 9), (10, 9))
    lora_A = [layer.lora_A for layer in layers.values()]
    lora_B = [layer.lora_B for layer in layers.values()]
    term = AdaLoraAllocator(layers, total_step=10, target_r=2, orth_reg_weight=0.3).regularization()
    torch.testing.assert_close(term, _peft_formula(lora_A, lora_B, 0.3))
    zero = AdaLoraAllocator(layers, total_step=10, target_r=2, orth_reg_weight=0).regularization()
    assert zero.shape == ()
    assert zero.item() == 0
    assert not zero.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_gradient_equals_the_one_autograd_gives(dtype: torch.dtype) -> None:
    """On top of what is there, and where there is nothing; a factor that is not trained is left alone."""
    torch.manual_seed(7)
    layers = adapter_layers((8, 9), (10, 9), dtype=dtype)
    factors = [factor for layer in layers.values() for factor in (layer.lora_A, layer.lora_B)]
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2, orth_reg_weight=0.3)
    layers["layer1"].lora_B.requires_grad_(False)
    factors[0].grad = torch.randn_like(factors[0])
    start = [None if factor.grad is None else factor.grad.clone() for factor in factors]
    term = allocator.add_regularization_gradient(scale=8.0)
    assert not term.requires_grad
    added = [factor.grad for factor in factors]
    for factor, gradient in zip(factors, start, strict=True):
        factor.grad = gradient
    through_autograd = allocator.regularization()
    (8.0 * through_autograd).backward()
    torch.testing.assert_close(term, through_autograd.detach())
    for gradient, factor in zip(added, factors, strict=True):
        assert (gradient is None) == (factor.grad is None) == (not factor.requires_grad)
        if gradient is not None:
            torch.testing.assert_close(gradient, factor.grad)
    assert all(layer.lora_E.grad is None for layer in layers.values())


def test_added_gradient_with_weight_zero_touches_nothing() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2, orth_reg_weight=0)
    assert allocator.add_regularization_gradient().item() == 0
    assert layers["layer0"].lora_A.grad is None


def test_added_gradient_leaves_dead_ranks_alone() -> None:
    torch.manual_seed(8)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=6, target_r=2, compact=True)
    for _ in range(6):
        draw_gradients(layers)
        allocator.step()
    pattern = allocator.rank_pattern()
    for layer in layers.values():
        layer.lora_A.grad = layer.lora_B.grad = None
    torch.testing.assert_close(allocator.add_regularization_gradient(), allocator.regularization().detach())
    for name, layer in layers.items():
        kept = torch.tensor(pattern[name])
        assert 0 < int(kept.sum()) < 6
        assert not layer.lora_A.grad[~kept].any() and layer.lora_A.grad[kept].all()
        assert not layer.lora_B.grad[:, ~kept].any() and layer.lora_B.grad[:, kept].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_a_named_implementation_serves_every_dtype(impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and (reason := registry.backend_status()["cpu"]) is not None:
        pytest.skip(reason)
    torch.manual_seed(9)
    lora_A, lora_B = _factors(dtype)
    ours = orthogonality(lora_A, lora_B, 1.0, impl=impl)
    ours.backward()
    exact = _peft_formula([a.double() for a in lora_A], [b.double() for b in lora_B], 1.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert all(factor.grad is not None and factor.grad.dtype == dtype for factor in lora_A + lora_B)
