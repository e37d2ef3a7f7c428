"""AdaLoRA's learning rate and alpha from LoRA's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from peftkernels.allocation import AdaLoraRates, from_lora
from peftkernels.nn import AdaLoRALinear, LoRALinear

LORA: dict[str, Any] = {"lr": 1e-3, "lora_alpha": 16, "r": 8, "init_r": 12, "out_features": 384}


def test_formula() -> None:
    # √(8·384/(3·12)) = 9.24 times as much of learning rate times scale
    found = from_lora(**LORA)
    assert found.lr == pytest.approx(5e-3)
    assert found.lora_alpha == pytest.approx(12 * 2.0 * math.sqrt(8 * 384 / 36) / 5)
    assert from_lora(**LORA, lr_multiplier=1.0) == AdaLoraRates(1e-3, pytest.approx(5 * found.lora_alpha))


def _adam_step(layer: nn.Module, lr: float) -> float:
    """‖ΔW‖_F after one step of Adam on random gradients."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(trained, lr=lr).step()
    return float(layer.delta_weight().norm())


@pytest.mark.parametrize(("k", "n"), [(96, 256), (384, 384), (1024, 512), (128, 2048)])
def test_one_step_of_adam_moves_both_as_far(k: int, n: int, seed: int) -> None:
    """From where LoRA starts, and from where the orthogonality term brings AdaLoRA: orthonormal rows, small gates."""
    torch.manual_seed(seed)
    lr, alpha, r, init_r = 1e-6, 16, 8, 12
    lora = LoRALinear.from_linear(nn.Linear(k, n), r, alpha)
    rates = from_lora(lr=lr, lora_alpha=alpha, r=r, init_r=init_r, out_features=n)
    adalora = AdaLoRALinear.from_linear(nn.Linear(k, n), init_r, rates.lora_alpha)
    nn.init.orthogonal_(adalora.lora_A)
    nn.init.orthogonal_(adalora.lora_B)
    moved_lora, moved_adalora = _adam_step(lora, lr), _adam_step(adalora, rates.lr)
    # AdaLoRA's is exact; LoRA's varies with the draw of A.
    assert moved_adalora == pytest.approx(rates.lr * rates.lora_alpha / math.sqrt(init_r), rel=1e-3)
    assert moved_adalora == pytest.approx(moved_lora, rel=0.1)


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"r": 8.0}, TypeError, "r: found 8.0"),
        ({"r": 0}, ValueError, "r: found 0, expected at least 1"),
        ({"init_r": True}, TypeError, "init_r: found True"),
        ({"out_features": -1}, ValueError, "out_features: found -1"),
        ({"lr": "1e-3"}, TypeError, "lr: found '1e-3'"),
        ({"lr": 0.0}, ValueError, "lr: found 0.0"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha: found nan"),
        ({"lora_alpha": -1}, ValueError, "lora_alpha: found -1"),
        ({"lr_multiplier": 0}, ValueError, "lr_multiplier: found 0"),
    ],
)
def test_arguments_are_checked(argument: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        from_lora(**{**LORA, **argument})
