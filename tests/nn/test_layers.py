"""LoRALinear and AdaLoRALinear: results, initial values, gradients, arguments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.layers import KINDS, factors_of, formula, set_states, small_layer
from torch import Tensor, nn

from peftkernels import RankState
from peftkernels.nn import AdaLoRALinear, LoRALinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_formula(kind: str, bias: bool) -> None:
    layer = small_layer(kind, bias=bias)
    if isinstance(layer, AdaLoRALinear):
        set_states(layer, [2, 1, 2, 0])
    x = torch.randn(2, 5, 11)
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)
    layer.double()
    torch.testing.assert_close(layer(x.double()), formula(layer, x), rtol=1e-13, atol=1e-13)


def test_scaling() -> None:
    linear = nn.Linear(5, 3)
    assert LoRALinear.from_linear(linear, 4, 6).scaling == 1.5
    assert AdaLoRALinear.from_linear(linear, 4, 6).scaling == 6 / (4 + 1e-5)
    for r in (4, 12):
        layer = AdaLoRALinear.from_linear(linear, r)
        assert layer.lora_alpha == 4 * r
        assert layer.scaling == 4 * r / (r + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 12, 8).scaling == 8 / (12 + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 4, 0).scaling == 4 / (4 + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 4, -3).scaling == 4 / (4 + 1e-5)


def test_initial_values() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 200)
    x = torch.randn(4, 300)
    expected = linear(x)
    lora = LoRALinear.from_linear(linear, 16, 16)
    bound = 1 / math.sqrt(300)  # kaiming_uniform with a = √5
    largest = lora.lora_A.weight.abs().max().item()
    assert 0.98 * bound < largest <= bound
    assert not lora.lora_B.weight.any()
    torch.testing.assert_close(lora(x), expected)
    adalora = AdaLoRALinear.from_linear(linear, 16)
    for factor in (adalora.lora_A, adalora.lora_B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(factor.mean().item()) < 0.002
    assert not adalora.lora_E.any()
    assert adalora.rank_state.tolist() == [RankState.ACTIVE] * 16
    assert adalora.rank_plan.counts.tolist() == [16, 16]
    torch.testing.assert_close(adalora(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_shared_and_frozen(kind: str) -> None:
    linear = nn.Linear(11, 7)
    layer = KINDS[kind].from_linear(linear, 4, 6)
    assert layer.base_layer is linear
    assert layer.base_layer.weight is linear.weight
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    layer(torch.randn(3, 11)).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None
    assert all(factor.grad is not None for factor in factors_of(layer))
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(factor) for factor in factors_of(layer)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_half_precision_base_are_float32(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind].from_linear(nn.Linear(11, 7).to(dtype), 4, 6)
    assert {factor.dtype for factor in factors_of(layer)} == {torch.float32}
    assert layer(torch.randn(3, 11, dtype=dtype)).dtype == dtype
    assert {factor.dtype for factor in factors_of(KINDS[kind].from_linear(nn.Linear(11, 7).double(), 4, 6))} == {
        torch.float64
    }


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only_and_on_the_adapter_only(kind: str) -> None:
    layer = small_layer(kind, lora_dropout=0.5)
    x = torch.randn(64, 11)
    without = small_layer(kind)
    assert torch.equal(layer.eval()(x), without(x))
    torch.manual_seed(1)
    first = layer.train()(x)
    second = layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    all_dropped = small_layer(kind, lora_dropout=1.0)
    torch.testing.assert_close(all_dropped(x), all_dropped.base_layer(x))


def test_probe_and_dead_ranks() -> None:
    layer = small_layer("adalora")
    set_states(layer, [2, 1, 0, 2])
    layer(torch.randn(6, 11)).square().sum().backward()
    grad_A, grad_B, grad_E = (factor.grad for factor in factors_of(layer))
    assert grad_A.any(1).tolist() == [True, False, False, True]
    assert grad_B.any(0).tolist() == [True, False, False, True]
    assert (grad_E.flatten() != 0).tolist() == [True, True, False, True]


def test_gradients_equal_pefts() -> None:
    """Same factors, same upstream gradient, in float64."""
    peft_lora = pytest.importorskip("peft.tuners.lora", reason="the comparison with HF peft needs peft installed")
    peft_adalora = pytest.importorskip("peft.tuners.adalora", reason="the comparison with HF peft needs peft installed")
    adalora = pytest.importorskip("peft", reason="the comparison with HF peft needs peft installed").AdaLoraConfig
    for kind in KINDS:
        layer = small_layer(kind).double()
        base = copy.deepcopy(layer.base_layer)
        if kind == "lora":
            config = peft_lora.LoraConfig(r=4, lora_alpha=6)
            theirs = peft_lora.Linear(base, "default", config=config, r=4, lora_alpha=6)
            own = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
        else:
            theirs = peft_adalora.SVDLinear(base, "default", config=adalora(total_step=5), r=4, lora_alpha=6)
            own = [theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_E["default"]]
        with torch.no_grad():
            for their_factor, factor in zip(own, factors_of(layer), strict=True):
                their_factor.copy_(factor)
        x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(6, 7, dtype=torch.float64)
        y, their_y = layer(x), theirs(x)
        torch.testing.assert_close(y, their_y, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(y, [x, *factors_of(layer)], upstream)
        expected = torch.autograd.grad(their_y, [x, *own], upstream)
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


ARGUMENTS = [
    ({"linear": nn.Conv1d(3, 3, 1)}, TypeError, "linear: found Conv1d, expected a torch.nn.Linear"),
    ({"r": 2.0}, TypeError, r"r: found 2.0 \(float\), expected an int"),
    ({"r": True}, TypeError, "r: found True"),
    ({"r": -1}, ValueError, "r: found -1, expected at least"),
    ({"lora_alpha": "8"}, TypeError, "lora_alpha: found '8'"),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha: found nan, expected a finite number"),
    ({"lora_dropout": 1.5}, ValueError, r"lora_dropout: found 1.5, expected a probability in \[0, 1\]"),
    ({"lora_dropout": None}, TypeError, "lora_dropout: found None"),
    ({"impl": "fast"}, ValueError, "impl: found 'fast', expected 'auto' or one of reference, eager"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_arguments_are_checked(kind: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    linear = nn.Linear(3, 3)
    with pytest.raises(error, match=message):
        KINDS[kind].from_linear(**{"linear": linear, "r": 2, "lora_alpha": 8, **arguments})
    # A refused call leaves the layer as it was.
    assert linear.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_that_do_more_are_refused(kind: str) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, arguments, output: output)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    whole_numbers = nn.Linear(3, 3)
    whole_numbers.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int32), requires_grad=False)
    for linear, error, message in [
        (Doubling(3, 3), TypeError, "Doubling with a forward of its own"),
        (patched, TypeError, "with a forward of its own"),
        (hooked, ValueError, "found forward hooks"),
        (parametrized, ValueError, "parametrized"),
        (whole_numbers, TypeError, r"found weight dtype torch\.int32"),
    ]:
        with pytest.raises(error, match=message):
            KINDS[kind].from_linear(linear, 2, 8)


def test_rank_zero() -> None:
    with pytest.raises(ValueError, match="r: found 0, expected at least 1"):
        LoRALinear.from_linear(nn.Linear(3, 3), 0, 8)
    layer = AdaLoRALinear.from_linear(nn.Linear(3, 3), 0)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.merge()
    layer.unmerge()


def test_repr_says_what_the_layer_is() -> None:
    text = repr(small_layer("adalora", lora_dropout=0.1, impl="eager"))
    first = text.splitlines()[0] + text.splitlines()[1]
    for part in ("AdaLoRALinear", "in_features=11", "out_features=7", "r=4", "lora_alpha=6", "lora_dropout=0.1"):
        assert part in first
    assert "impl='eager'" in first
