"""The operators' schemas, fakes and traceability, by torch.library.opcheck, and their FLOP formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Call, make_call
from support.devices import FROZEN_WEIGHTS, device_of
from support.implementations import ALL, skip_unless_served
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftkernels import lora_linear
from peftkernels.backends import registry
from peftkernels.ops.schemas import rank_dtype

SITUATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"gate": False, "bias": False},
    "gated": {},
    "rank_plan": {"plan": True, "scaling": "tensor"},
    "dropout": {"plan": True, "dropout_p": 0.3},
    "bf16-fp32_factors": {"plan": True, "dtype": "bf16-fp32_factors"},
    "fp16-fp32_factors": {"plan": True, "dtype": "fp16-fp32_factors"},
    "no_rows": {"leading": (0,)},
    "rank_zero": {"r": 0},
    "vector": {"leading": ()},
    "three_dimensions": {"leading": (2, 3), "plan": True},
}
NEEDS = {
    "all": [True, False, True, True, True, True],
    "x": [True, False, False, False, False, False],
    "factors": [False, False, True, True, False, False],
    "gate": [False, False, False, False, False, True],
    "none": [False] * 6,
}
in_every_situation = pytest.mark.parametrize("situation", SITUATIONS)


def _shared(call: Call) -> tuple[Any, ...]:
    plan = call.rank_plan
    states = (None, None, None) if plan is None else (plan.state, plan.order, plan.counts)
    scaling_tensor = call.scaling if isinstance(call.scaling, Tensor) else None
    scaling = 1.0 if isinstance(call.scaling, Tensor) else call.scaling
    seed = None if call.dropout_seed is None else torch.tensor(call.dropout_seed)
    return (call.gate, *states, scaling, scaling_tensor, call.dropout_p, seed)


def _check_forward(impl: str, call: Call, save_shrink: bool) -> None:
    operator = getattr(torch.ops.peftkernels.lora_linear_fwd, impl)
    arguments = (call.x, call.weight, call.lora_A, call.lora_B, call.bias, *_shared(call), save_shrink)
    torch.library.opcheck(operator, arguments)


def _check_backward(impl: str, call: Call, needs: list[bool]) -> None:
    present = [name in call.tensors() for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")]
    asked = [need and there for need, there in zip(needs, present, strict=True)]
    shrink = torch.randn(call.x.shape[:-1].numel(), call.r, dtype=rank_dtype(call.x.dtype))
    operator = getattr(torch.ops.peftkernels.lora_linear_bwd, impl)
    arguments = (call.grad_y, call.x, call.weight, call.lora_A, call.lora_B, call.bias, shrink, *_shared(call), asked)
    torch.library.opcheck(operator, arguments)


@in_every_situation
def test_forward(impl: str, situation: str, seed: int) -> None:
    _check_forward(impl, make_call(seed, **SITUATIONS[situation]), save_shrink=True)


def test_forward_that_saves_nothing(impl: str, seed: int) -> None:
    _check_forward(impl, make_call(seed, plan=True), save_shrink=False)


@in_every_situation
def test_backward(impl: str, situation: str, seed: int) -> None:
    _check_backward(impl, make_call(seed, **SITUATIONS[situation]), NEEDS["all"])


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_backward_of_some_arguments(impl: str, needs: list[bool], seed: int) -> None:
    _check_backward(impl, make_call(seed, plan=True), needs)


@pytest.mark.parametrize("needs_weight", [False, True], ids=["frozen", "trained_weight"])
@pytest.mark.parametrize("name", ["reference", "eager"])
def test_backward_of_the_weight(name: str, needs_weight: bool, seed: int) -> None:
    call = make_call(seed)
    shrink = torch.randn(7, call.r)
    operator = getattr(torch.ops.peftkernels.lora_linear_bwd, name)
    arguments = (call.grad_y, call.x, call.weight, call.lora_A, call.lora_B, call.bias, shrink, *_shared(call))
    torch.library.opcheck(operator, (*arguments, [True, needs_weight, True, True, True, True]))


def test_backward_without_what_was_not_saved(impl: str, seed: int) -> None:
    """x and S are None where no gradient that was asked for needs them."""
    call = make_call(seed)
    operator = getattr(torch.ops.peftkernels.lora_linear_bwd, impl)
    needs = [True, False, False, False, True, False]
    arguments = (call.grad_y, None, call.weight, call.lora_A, call.lora_B, call.bias, None, *_shared(call), needs)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strided_arguments(impl: str, layout: str, seed: int) -> None:
    call = make_call(seed, leading=(6, 7))
    x = {
        "transposed": call.x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": call.x[:1].expand(6, 7, 29),
        "sliced": call.x.repeat(1, 1, 2)[..., :29],
    }[layout]
    operator = getattr(torch.ops.peftkernels.lora_linear_fwd, impl)
    torch.library.opcheck(operator, (x, call.weight, call.lora_A, call.lora_B, call.bias, *_shared(call), True))


def test_the_operators_are_registered_on_the_dispatcher() -> None:
    for operator in ("lora_linear_fwd", "lora_linear_bwd"):
        packet = getattr(torch.ops.peftkernels, operator)
        # Backends that were registered and taken out leave theirs.
        assert set(packet.overloads()) >= set(registry.OPERATORS)
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            assert not schema.is_mutable, f"{operator}.{overload} is not functional"


@pytest.mark.parametrize(
    ("trained", "forward_share", "backward_share"),
    [
        # Multiply-adds of the low-rank products, in units of M·r: K in the shrink, N in the expand, …
        (("x",), "K+N", "MNK + N+K"),
        (("lora_A",), "K+N", "N+K"),
        (("lora_B",), "K+N", "N"),
        (("x", "lora_A", "lora_B"), "K+N", "MNK + N+K+K+N"),
        (("gate",), "K+N", "N"),
        (("bias",), "K+N", ""),
        (("weight",), "K+N", "MNK"),
        (("x", "weight", "lora_A", "lora_B", "bias", "gate"), "K+N", "MNK + MNK + N+K+K+N"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("name", ALL)
def test_flops(name: str, trained: tuple[str, ...], forward_share: str, backward_share: str, seed: int) -> None:
    skip_unless_served(name)
    if name in FROZEN_WEIGHTS and "weight" in trained:
        pytest.skip(f"impl={name!r} serves frozen weights")
    m, n, k, r = 6, 33, 29, 5
    call = make_call(seed, leading=(2, 3), n=n, k=k, r=r).on(device_of(name))
    leaves = {key: value.requires_grad_(key in trained) for key, value in call.tensors().items()}
    sizes = {"K": 2 * m * r * k, "N": 2 * m * r * n, "MNK": 2 * m * n * k, "": 0}

    def count(terms: str) -> int:
        return sum(sizes[term.strip()] for term in terms.split("+"))

    with FlopCounterMode(display=False) as forward:
        y = lora_linear(*(leaves[key] for key in ("x", "weight", "lora_A", "lora_B")), impl=name, **call.optional)
    assert forward.get_total_flops() == 2 * m * n * k + count(forward_share)
    with FlopCounterMode(display=False) as backward:
        y.backward(call.grad_y)
    assert backward.get_total_flops() == count(backward_share)
