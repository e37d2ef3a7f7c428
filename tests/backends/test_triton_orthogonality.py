"""The orthogonality term in Triton kernels, beside float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.allocation_calls import (
    LAYERS,
    assert_same,
    in_every_dtype,
    in_every_layout,
)
from support.orthogonality_error import added_error, assert_within, term_errors
from torch import Tensor

from peftkernels.backends.eager.allocation import EagerKernels
from peftkernels.backends.triton import allocation


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


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
    exact_value, exact_gradients = EagerKernels().orthogonality(_doubled(lora_A), _doubled(lora_B), 0.5, keep)
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
        exact_value, gradients = EagerKernels().orthogonality(_doubled(lora_A), _doubled(lora_B), 0.5)
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
    assert_same([value, *gradients], [other_value, *others])
