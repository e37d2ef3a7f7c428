"""Small models with AdaLoRA layers, on peftkernels and on HF peft, and the gradients the tests feed them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkernels.nn import AdaLoRALinear

FACTORS = ("lora_A", "lora_B", "lora_E")


class Base(nn.Module):
    """Three linear layers of three shapes and a frozen nonlinearity; returns a namespace with a loss, as peft wants."""

    def __init__(self, width: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width)
        self.third = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        y = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return SimpleNamespace(loss=(y - target).square().mean())


NAMES = ("first", "second", "third")


def adapt(base: nn.Module, r: int = 6, **arguments: Any) -> nn.Module:
    """Replace the base model's linear layers by AdaLoRALinear."""
    for name in NAMES:
        setattr(base, name, AdaLoRALinear.from_linear(getattr(base, name), r, **arguments))
    return base


def adapter_layers(
    *shapes: tuple[int, int], r: int = 6, dtype: torch.dtype = torch.float32
) -> dict[str, AdaLoRALinear]:
    """Layers of the given (N, K), with gates that are not zero."""
    layers = {}
    for index, (n, k) in enumerate(shapes):
        layer = AdaLoRALinear.from_linear(nn.Linear(k, n), r)
        nn.init.normal_(layer.lora_E, std=0.05)
        layers[f"layer{index}"] = layer.to(dtype)
    return layers


def trainable(source: nn.Module | dict[str, AdaLoRALinear]) -> list[nn.Parameter]:
    modules = source.values() if isinstance(source, dict) else [source]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def draw_gradients(layers: dict[str, AdaLoRALinear], scale: float = 1e-2) -> None:
    for parameter in trainable(layers):
        parameter.grad = torch.randn_like(parameter) * scale


def masks(layers: dict[str, AdaLoRALinear]) -> dict[str, list[int]]:
    return {name: layer.rank_state.tolist() for name, layer in layers.items()}


def peft_adalora(base: nn.Module, **config: Any) -> Any:
    """The base model under HF peft's AdaLoRA, `ranknum` frozen: peft 0.21 trains it on bases that are not float32."""
    peft = pytest.importorskip("peft", reason="the comparison with HF peft needs peft installed")
    model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=list(NAMES), **config))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model


def copy_factors(layers: dict[str, AdaLoRALinear], peft_model: Any) -> None:
    """Give HF peft's layers the values of ours."""
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = peft_model.base_model.model.get_submodule(name)
            for factor in FACTORS:
                getattr(theirs, factor)["default"].copy_(getattr(layer, factor))


def averages_of(allocator: Any) -> dict[str, Tensor]:
    """AdaLoRA's running averages by "<sensitivity or uncertainty>.<layer>.<factor>"."""
    saved = allocator.state_dict()
    return {name.removeprefix("strategy."): value for name, value in saved.items() if name.startswith("strategy.")}
