"""Small models under HF peft's AdaLoRA, trained side by side with peft's allocation and with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftkernels.backends import registry
from peftkernels.integrations.peft import allocator_factors
from peftkernels.integrations.peft.allocator import (
    AllocatorRecord,
    apply_to_adalora_model,
)

TARGETS = ["query", "key", "value", "out", "up", "down"]
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PHASES = {"total_step": 60, "tinit": 12, "tfinal": 20, "deltaT": 3}
# Of steps in these phases: warm-up, decreasing budget, last allocation, final.
RUN = 66


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 20) for _ in range(3))
        self.out = nn.Linear(20, 24, bias=False)
        self.up, self.down = nn.Linear(24, 37), nn.Linear(37, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        x = x + self.out(weights @ self.value(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any] = lambda loss: SimpleNamespace(loss=loss)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.give = give

    def forward(self, x: Tensor, target: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.give((x - target).square().mean())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3)
        self.out = nn.Linear(108, 24)

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        x = x.reshape(-1, 3, 8, 8)
        x = self.out(torch.tanh(self.down(torch.tanh(self.up(x)))).flatten(1))
        return SimpleNamespace(loss=(x - target.reshape(-1, 24)[: len(x)]).square().mean())


def draw(model: nn.Module, std: float = 0.05) -> None:
    """Factors that are not zero, E included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make(base: nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(3)
    settings = {"target_modules": TARGETS, "init_r": 6, "target_r": 3, "total_step": 200} | config
    model = peft.get_peft_model(base or Net(), peft.AdaLoraConfig(**settings))
    draw(model)
    return model


def patched(model: Any) -> Any:
    model = copy.deepcopy(model)
    apply_to_adalora_model(model.base_model)
    return model


def record(model: Any) -> AllocatorRecord:
    return model.base_model._peftkernels_allocator


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, 8, 24, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


class Driver:
    """Trains models side by side on the gradients of the first, and compares them after every step."""

    def __init__(self, *models: Any, spoil: Callable[[int, dict[str, nn.Parameter]], None] | None = None) -> None:
        self.models = list(models)
        self.spoil = spoil
        # Where a gradient scaler would have left them out.
        self.without_optimizer: set[int] = set()
        self.optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-3) for model in models]

    def step(self, step: int, x: tuple[Tensor, Tensor] | None = None) -> None:
        first = trained(self.models[0])
        dtype = next(iter(first.values())).dtype
        self.models[0].base_model(*(x or inputs(step, dtype))).loss.backward()
        if self.spoil is not None:
            self.spoil(step, first)
        for model in self.models[1:]:
            for name, parameter in trained(model).items():
                gradient = first[name].grad
                parameter.grad = None if gradient is None else gradient.clone()
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            if step not in self.without_optimizer:
                optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        for model in self.models[1:]:
            assert_same(self.models[0], model)

    def run(self, steps: range) -> None:
        for step in steps:
            self.step(step)


def assert_same(stock: Any, other: Any) -> None:
    """Parameters, rank pattern and averages, to the bit."""
    theirs = dict(other.named_parameters())
    for name, parameter in stock.named_parameters():
        assert equal(parameter, theirs[name]), name
    assert stock.peft_config["default"].rank_pattern == other.peft_config["default"].rank_pattern
    for average in AVERAGES:
        expected = getattr(stock.base_model.rankallocator, average)
        found = getattr(other.base_model.rankallocator, average)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert equal(tensor, found[name]), (average, name)


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))


def use_kernels(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Let the allocations made from now on run on this implementation."""
    monkeypatch.setattr(
        allocator_factors,
        "kernels_for",
        lambda device, dtype: registry.kernels_for(device, dtype, impl),
    )
