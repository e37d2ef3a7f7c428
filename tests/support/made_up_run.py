"""What an allocator would tell its observers, made up: no model, every number drawn from the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkernels.allocation.logs.observer import Observer

PROJECTIONS = ("attention.query", "attention.value", "output.dense")


def module_names(count: int) -> list[str]:
    """Names like an encoder's: three projections a layer."""
    return [f"encoder.layer.{i // 3}.{PROJECTIONS[i % 3]}" for i in range(count)]


class Heard:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.decisions: list[tuple[Any, ...]] = []
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, facts: Any) -> None:
        self.facts = facts

    def on_decision(self, *told: Any) -> None:
        self.decisions.append(told)

    def on_event(self, *told: Any) -> None:
        self.events.append(told)


class MadeUpRun:
    """A run of ``steps`` steps whose budget falls linearly between a tenth and seven tenths of them.

    A loss at every step, a skipped step at 3, and a rollback where ``rollback`` says (at, to), once.
    """

    def __init__(
        self,
        modules: int = 6,
        steps: int = 20,
        seed: int = 0,
        rank: int = 4,
        rollback: tuple[int, int] | None = None,
        strategy: str = "adalora",
    ) -> None:
        self.names = module_names(modules)
        self.steps, self.seed, self.rank, self.rollback, self.strategy = steps, seed, rank, rollback, strategy
        self.importance = np.random.default_rng(seed).lognormal(sigma=1.0, size=(modules, rank))

    def facts(self, step: int = 0, rollbacks: int = 0) -> dict[str, Any]:
        """As ``Observer.on_start`` gets them."""
        modules = [
            {
                "name": name,
                "rank": self.rank,
                "in_features": 32,
                "out_features": 64,
                "group": "attention" if "attention" in name else "mlp",
                "cost": 1.0,
            }
            for name in self.names
        ]
        settings = {"total_step": self.steps, "target_r": self.rank // 2, "deltaT": 1}
        return {
            "strategy": self.strategy,
            "settings": settings,
            "modules": modules,
            "unit": "ranks",
            "step": step,
            "rollbacks": rollbacks,
        }

    def feed(
        self, observers: Sequence[Observer], first: int = 0, last: int | None = None, rollbacks: int = 0
    ) -> tuple[int, int]:
        """Run from after step ``first`` to ``last``; returns the step and the rollbacks then reached."""
        for observer in observers:
            observer.on_start(self.facts(first, rollbacks))
        step = first
        while step < (self.steps if last is None else last):
            step += 1
            for observer in observers:
                self._tell(observer, step, rollbacks)
            if self.rollback is not None and rollbacks == 0 and step == self.rollback[0]:
                for observer in observers:
                    observer.on_event(step, "rollback", {"to": self.rollback[1], "why": "the loss left its band"})
                step, rollbacks = self.rollback[1], 1
        return step, rollbacks

    def _tell(self, observer: Observer, step: int, rollbacks: int) -> None:
        observer.on_event(step, "loss", {"value": 2.0 / step + rollbacks})
        if step == 3:
            observer.on_event(step, "skipped", {"why": "the gradients are not finite"})
        if not 0.1 * self.steps < step <= 0.7 * self.steps:
            return
        total = self.importance.size
        share = (step - 0.1 * self.steps) / (0.6 * self.steps)
        budget = round(total * (1 - share / 2))
        noise = np.random.default_rng((self.seed, step, rollbacks)).lognormal(sigma=0.3, size=self.importance.shape)
        scores = 1e-8 * self.importance * noise
        threshold = float("-inf") if budget == total else float(np.sort(scores, axis=None)[total - budget - 1])
        thresholds = [threshold] * len(self.names)
        observer.on_decision(step, float(budget), thresholds, scores.tolist(), (scores > threshold).tolist())
