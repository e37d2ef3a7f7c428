"""Small layers whose adapters contribute, and what they mean."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkernels import RankState
from peftkernels.nn import AdaLoRALinear, LoRALinear

KINDS = {"lora": LoRALinear, "adalora": AdaLoRALinear}
Layer = LoRALinear | AdaLoRALinear


def small_layer(
    kind: str, *, n: int = 7, k: int = 11, r: int = 4, bias: bool = True, seed: int = 0, **arguments: Any
) -> Layer:
    """A layer whose adapter contributes: no factor is zero."""
    torch.manual_seed(seed)
    layer = KINDS[kind].from_linear(nn.Linear(k, n, bias=bias), r, **{"lora_alpha": 6, **arguments})
    with torch.no_grad():
        for parameter in factors_of(layer):
            parameter.normal_(std=0.5)
    return layer


def factors_of(layer: Layer) -> list[nn.Parameter]:
    """The trained factors, A and B first."""
    if isinstance(layer, LoRALinear):
        return [layer.lora_A.weight, layer.lora_B.weight]
    return [layer.lora_A, layer.lora_B, layer.lora_E]


def set_states(layer: AdaLoRALinear, states: list[int]) -> None:
    """Write the states of all ranks, and the plan with them."""
    layer.rank_plan.update_(torch.tensor(states, dtype=torch.uint8))


def formula(layer: Layer, x: Tensor) -> Tensor:
    """The docstring's formula in float64."""
    factors = [factor.double() for factor in factors_of(layer)]
    gate = torch.ones(layer.r, dtype=torch.float64)
    if isinstance(layer, AdaLoRALinear):
        gate = factors[2].flatten() * (layer.rank_state == RankState.ACTIVE)
    bias = None if layer.bias is None else layer.bias.double()
    base = F.linear(x.double(), layer.base_layer.weight.double(), bias)
    return base + layer.scaling * ((x.double() @ factors[0].T) * gate) @ factors[1].T
