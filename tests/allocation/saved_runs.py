"""Training runs that are written to files between any two calls and go on from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_models import NAMES, Base, adapt, masks, trainable
from torch import Tensor

from peftkernels.allocation import Budget, BudgetAllocator, Group
from peftkernels.allocation.strategies import STRATEGIES

RANK = 6
COSTS = {"first": 2.5, "second": 1.25, "third": 0.7}
# Layers of 40 x 24, 24 x 40 and 24 x 24 with 6 ranks each.
BUDGETS: dict[str, Budget] = {
    "ranks": Budget(7),
    "parameters": Budget(400, "parameters"),
    "microseconds": Budget(9.3, "microseconds"),
    "groups": Budget(groups={"wide": Group(["first", "second"], 5), "square": Group("third", 2)}),
    "group and rest": Budget(300.0, "parameters", {"square": Group("thi*", 160)}),
}
MODES: dict[str, dict[str, bool]] = {
    "threshold": {},
    "exact": {"exact_budget": True},
    "compact": {"compact": True},
    "capturable": {"capturable": True},
    "capturable exact": {"capturable": True, "exact_budget": True},
}
SCHEDULE: dict[str, Any] = {"total_step": 12, "tinit": 3, "tfinal": 2, "deltaT": 2}
# Before the first mask, at a mask and after it, around the last allocation, in the final phase.
STOPS = (0, 2, 4, 5, 9, 10, 11)
STEPS = 12


def make_allocator(model: Any, strategy: str, budget: str | None = "ranks", **options: Any) -> BudgetAllocator:
    what = {"target_r": 2} if budget is None else {"budget": BUDGETS[budget], "costs": COSTS}
    return BudgetAllocator(model, STRATEGIES[strategy](), **what, **{**SCHEDULE, **options})


def data(steps: int, parts: int = 1) -> Tensor:
    """Inputs and targets of every micro-batch: (steps, parts, 2, 8, 24)."""
    return torch.randn(steps, parts, 2, 8, 24, generator=torch.Generator().manual_seed(0))


class Run:
    """A run made of single calls: forward and backward of one batch, the optimizer's step, and so on."""

    def __init__(self, seed: int, strategy: str, budget: str = "ranks", fused: bool = False, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = adapt(Base(), r=RANK)
        for layer in self.layers.values():
            torch.nn.init.normal_(layer.lora_E, std=0.1)
        self.allocator = make_allocator(self.model, strategy, budget, **options)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-2, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        self.allocator.attach(self.optimizer)
        self.log: list[Any] = []

    @property
    def layers(self) -> dict[str, Any]:
        return {name: self.model.get_submodule(name) for name in NAMES}

    def call(self, name: str, batch: Tensor, scaled: bool = False, overflow: bool = False) -> None:
        """One of the calls of an optimizer step: those that `calls` names."""
        if name.isdigit():
            part = batch[int(name)]
            loss = self.model(*part).loss
            self.allocator.observe(loss)
            whole = (loss + self.allocator.regularization()) / len(batch)
            (self.scaler.scale(whole) if scaled else whole).backward()
            if overflow:
                self.layers["second"].lora_A.grad.view(-1)[0] = torch.inf
            self.log.append(loss.item())
        elif name == "step":
            if scaled:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
        elif name == "update":
            self.scaler.update()
        else:
            self.optimizer.zero_grad()
            self.log.append(masks(self.layers))

    @staticmethod
    def calls(batch: Tensor, scaled: bool = False) -> list[str]:
        return [*map(str, range(len(batch))), "step", *(["update"] if scaled else []), "clear"]

    def advance(self, batches: Tensor) -> None:
        for batch in batches:
            for name in self.calls(batch):
                self.call(name, batch)

    def save(self, folder: Path) -> None:
        save_file(self.allocator.state_dict(), folder / "allocator.safetensors")
        others = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
        }
        torch.save(others, folder / "others.pt")

    def load(self, folder: Path) -> None:
        others = torch.load(folder / "others.pt", weights_only=True)
        self.model.load_state_dict(others["model"])
        self.optimizer.load_state_dict(others["optimizer"])
        self.scaler.load_state_dict(others["scaler"])
        # A scaler takes its scale from the state when it first scales something.
        self.scaler.scale(torch.zeros(()))
        self.allocator.load_state_dict(load_file(folder / "allocator.safetensors"))
        for parameter, gradient in zip(self.model.parameters(), others["gradients"], strict=True):
            parameter.grad = gradient

    def outcome(self) -> dict[str, Any]:
        """All that a resumed run must end with to the bit."""
        allocator = self.allocator
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "allocator": allocator.state_dict(),
            "pattern": allocator.rank_pattern(),
            "plans": {name: list(plan_of(layer)) for name, layer in self.layers.items()},
            "report": str(allocator.explain()),
        }


def plan_of(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = layer.rank_plan
    return plan.state, plan.order, plan.counts


def assert_same_bits(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape, where
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.dim() else one.equal(other), where
    elif isinstance(one, Mapping):
        assert list(one) == list(other), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(left, right, f"{where}/{index}")
    else:
        assert one == other, where
