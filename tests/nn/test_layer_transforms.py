"""The layers compiled, called functionally, under autocast, and with other things in a parameter's place."""

from __future__ import annotations

import pytest
import torch
from support.layers import KINDS, factors_of, formula, set_states, small_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from peftkernels.nn import AdaLoRALinear, LoRALinear


class _Half(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def test_compiles_once_whatever_masks_and_gates() -> None:
    model = nn.Sequential(small_layer("adalora", seed=3), small_layer("adalora", n=11, k=7, seed=4)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 11)
    compiled(x).sum().backward()
    torch._dynamo.config.error_on_recompile = True
    try:
        for states in ([2, 1, 2, 0], [0, 0, 1, 1], [2, 2, 2, 2]):
            for layer in model:
                set_states(layer, states)
                with torch.no_grad():
                    layer.lora_E.normal_()
            model.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
            model.zero_grad()
            expected = model(x)
            expected.square().sum().backward()
            assert torch.equal(y, expected)
            plain = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            torch.testing.assert_close(gradients, plain, rtol=1e-6, atol=1e-6)
            assert all((gradient != 0).any() for gradient in plain) == (2 in states)
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    layer, other = small_layer(kind), small_layer(kind, seed=1)
    if isinstance(other, AdaLoRALinear):
        set_states(other, [0, 2, 2, 1])
    x = torch.randn(3, 11)
    replaced = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, replaced, (x,)), other(x))
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pruned", "parametrized", "plain_tensor"])
def test_what_stands_in_a_parameters_place_is_used(kind: str, how: str) -> None:
    """For a factor, and for the base layer's weight, where it was put there after the layer was made."""
    layer, expected = small_layer(kind), small_layer(kind)
    factor_of = layer.lora_A if isinstance(layer, LoRALinear) else layer
    name = "weight" if isinstance(layer, LoRALinear) else "lora_A"
    for module, attribute in ((factor_of, name), (layer.base_layer, "weight")):
        value = getattr(module, attribute).detach().clone()
        if how == "pruned":
            prune.custom_from_mask(module, attribute, torch.full_like(value, 0.5))
        elif how == "parametrized":
            parametrize.register_parametrization(module, attribute, _Half())
        else:
            delattr(module, attribute)
            setattr(module, attribute, value / 2)
    with torch.no_grad():
        factors_of(expected)[0].mul_(0.5)
        expected.base_layer.weight.mul_(0.5)
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer = small_layer(kind)
    x = torch.randn(3, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), formula(layer, x), rtol=0.03, atol=0.1)
    y.float().sum().backward()
    assert {factor.grad.dtype for factor in factors_of(layer)} == {torch.float32}
