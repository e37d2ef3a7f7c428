"""What is kept for backward: x itself, the parameters, S, and an 8-byte seed. Nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, Call, make_call
from support.devices import FROZEN_WEIGHTS
from support.implementations import skip_unless_served
from torch import Tensor

from peftkernels import lora_linear

ALL_DTYPES = ("fp32", "bf16", "bf16-fp32_factors", "fp16", "fp16-fp32_factors", "fp32-bf16_factors")
in_every_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES)
ROWS, RANKS = 42, 6


def _saved(call: Call, impl: str, needs: tuple[str, ...] = TRAINABLE, **changes: Any) -> list[Tensor]:
    """The tensors that one call saves, each storage once, without those that share a storage with an argument."""
    leaves = {name: value.detach().requires_grad_(name in needs) for name, value in call.tensors().items()}
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate"), **changes}
    given = [*leaves.values(), *(value for value in keywords.values() if isinstance(value, Tensor))]
    if call.rank_plan is not None:
        given += [call.rank_plan.state, call.rank_plan.order, call.rank_plan.counts]
    owned = {value.untyped_storage().data_ptr() for value in given}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in owned:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)
    assert y.requires_grad == bool(needs)
    return list(kept.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(value.untyped_storage().nbytes() for value in tensors)


@in_every_dtype
@pytest.mark.parametrize("plan", [False, True], ids=["", "rank_plan"])
def test_only_the_shrink_is_kept(impl: str, dtype: str, plan: bool, seed: int) -> None:
    skip_unless_served(impl, dtype)
    call = make_call(seed, leading=(2, 21), r=RANKS, dtype=dtype, plan=plan, scaling="tensor")
    kept = _saved(call, impl)
    expected = torch.float32 if call.x.dtype is torch.float16 else call.x.dtype
    assert [(tuple(value.shape), value.dtype) for value in kept] == [((ROWS, RANKS), expected)]
    assert _bytes(kept) == ROWS * RANKS * expected.itemsize


@in_every_dtype
def test_dropout_keeps_a_seed_and_no_mask(impl: str, dtype: str, seed: int) -> None:
    skip_unless_served(impl, dtype)
    call = make_call(seed, leading=(2, 21), r=RANKS, dtype=dtype, dropout_p=0.1)
    shrink = ROWS * RANKS * (4 if call.x.dtype is torch.float16 else call.x.element_size())
    assert _bytes(_saved(call, impl)) == shrink + 8
    assert _bytes(_saved(call, impl, dropout_seed=None)) == shrink + 8
    assert _bytes(_saved(call, impl, dropout_seed=torch.tensor(5))) == shrink


@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded"])
def test_a_strided_x_is_not_copied(impl: str, layout: str, seed: int) -> None:
    call = make_call(seed, leading=(ROWS,), r=RANKS)
    x = {
        "transposed": call.x.T.contiguous().T,
        "every_second": call.x.repeat_interleave(2, 1)[:, ::2],
        "expanded": call.x[:1].expand(ROWS, -1),
    }[layout]
    assert _bytes(_saved(call.replace(x=x), impl)) == ROWS * RANKS * 4


@pytest.mark.parametrize(
    ("needs", "keeps_shrink", "keeps_x"),
    [
        (("x",), False, False),
        (("bias",), False, False),
        (("x", "bias"), False, False),
        (("lora_A",), False, True),
        (("x", "lora_A"), False, True),
        (("lora_B",), True, False),
        (("gate",), True, False),
        (("lora_B", "gate"), True, False),
        (TRAINABLE, True, True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_only_what_the_asked_gradients_need(
    impl: str, needs: tuple[str, ...], keeps_shrink: bool, keeps_x: bool, seed: int
) -> None:
    call = make_call(seed, leading=(ROWS,), r=RANKS, plan=True)
    assert _bytes(_saved(call, impl, needs)) == (ROWS * RANKS * 4 if keeps_shrink else 0)

    places: set[int] = set()
    leaves = {name: value.detach().requires_grad_(name in needs) for name, value in call.tensors().items()}
    keywords = {**call.optional, "bias": leaves["bias"], "gate": leaves["gate"]}
    with torch.autograd.graph.saved_tensors_hooks(lambda value: places.add(value.data_ptr()), lambda value: value):
        lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)
    assert (leaves["x"].data_ptr() in places) == keeps_x


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing_requires_grad"])
def test_nothing_is_kept_without_gradients(impl: str, mode: str, seed: int) -> None:
    call = make_call(seed, leading=(ROWS,), r=RANKS, plan=True, dropout_p=0.1)
    saved: list[Tensor] = []
    leaves = {name: value.detach().requires_grad_(mode == "no_grad") for name, value in call.tensors().items()}
    if impl in FROZEN_WEIGHTS:
        leaves["weight"].requires_grad_(False)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value), context():
        y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **call.optional)
    assert not y.requires_grad
    assert saved == []


def test_the_shrink_operator_result_is_empty_without_gradients(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(ROWS,), r=RANKS)
    forward = getattr(torch.ops.peftkernels.lora_linear_fwd, impl)
    arguments = (call.x, call.weight, call.lora_A, call.lora_B, None, None, None, None, None, 1.0, None, 0.0, None)
    assert forward(*arguments, False)[1].shape == (0, RANKS)
    assert forward(*arguments, True)[1].shape == (ROWS, RANKS)


def test_backward_frees_what_was_kept(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(ROWS,), r=RANKS)
    x = call.x.requires_grad_()
    lora_B = call.lora_B.requires_grad_()
    y = lora_linear(x, call.weight, call.lora_A, lora_B, impl=impl)
    y.backward(call.grad_y)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(call.grad_y)
