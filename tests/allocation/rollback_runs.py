"""A run that can be poisoned and rolled back, and an observer that keeps what it is told."""

from __future__ import annotations

import copy
from typing import Any

import torch
from small_models import NAMES, Base, adapt, trainable
from torch import Tensor, nn

from peftkernels.allocation import (
    AdaLoraAllocator,
    RollbackPolicy,
    Snapshots,
)


class Listener:
    def __init__(self) -> None:
        self.events: list[tuple[int, str, dict[str, Any]]] = []

    def on_start(self, facts: Any) -> None:
        self.facts = facts

    def on_decision(self, *arguments: Any) -> None: ...

    def on_event(self, step: int, kind: str, details: Any) -> None:
        if kind != "loss":
            self.events.append((step, kind, dict(details)))


class Run:
    """A small teacher to be learned, with a trained head beside the adapters and a batch that can be poisoned."""

    def __init__(self, seed: int = 1, policy: dict[str, Any] | None = None, every: int = 5, **options: Any) -> None:
        torch.manual_seed(seed)
        torch.manual_seed(0)
        base = Base()
        teacher = copy.deepcopy(base)
        for name in NAMES:
            weight = getattr(teacher, name).weight
            weight.data += 0.3 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
        self.teacher = teacher
        torch.manual_seed(seed)
        self.model = adapt(base, r=6)
        self.head = nn.Parameter(torch.ones(24))
        arguments = {"total_step": 120, "target_r": 3, "tinit": 10, "tfinal": 30, "deltaT": 2, "orth_reg_weight": 0.1}
        self.allocator = AdaLoraAllocator(self.model, **{**arguments, **options})
        self.optimizer = torch.optim.AdamW([*trainable(self.model), self.head], lr=2e-2)
        self.allocator.attach(self.optimizer)
        self.listener = Listener()
        self.allocator.add_observer(self.listener)
        self.losses: list[float] = []
        self.policy = None
        if policy is not None:
            self.policy = RollbackPolicy(Snapshots(self.allocator, every=every, last=3), **policy)
            self.allocator.add_callback(self.policy)

    def forward(self, model: Base, x: Tensor) -> Tensor:
        return model.third(torch.tanh(model.second(torch.tanh(model.first(x)))))

    def advance(self, batches: range, poison: dict[int, float] | None = None) -> None:
        for batch in batches:
            x = torch.randn(16, 24, generator=torch.Generator().manual_seed(batch))
            with torch.no_grad():
                target = self.forward(self.teacher, x) * (poison or {}).get(batch, 1.0)
            loss = (self.forward(self.model, x) * self.head - target).square().mean()
            (loss + self.allocator.regularization()).backward()
            self.allocator.observe(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def test_loss(self) -> float:
        x = torch.randn(256, 24, generator=torch.Generator().manual_seed(10_000))
        with torch.no_grad():
            return (self.forward(self.model, x) * self.head - self.forward(self.teacher, x)).square().mean().item()

    def outcome(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "head": self.head.detach(),
            "optimizer": self.optimizer.state_dict(),
            "allocator": self.allocator.state_dict(),
            "losses": list(map(repr, self.losses)),
        }
