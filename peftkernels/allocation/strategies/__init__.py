"""The strategies that come with the package, one a file; `STRATEGIES` makes them by name with their defaults."""

from __future__ import annotations

from collections.abc import Callable

from peftkernels.allocation.strategies.adalora import AdaLora
from peftkernels.allocation.strategies.bandit import Bandit
from peftkernels.allocation.strategies.gate_gradient import GateGradient
from peftkernels.allocation.strategies.group_shares import GroupShares
from peftkernels.allocation.strategies.knapsack import Knapsack
from peftkernels.allocation.strategies.magnitude import Magnitude
from peftkernels.allocation.strategies.prior import Prior
from peftkernels.allocation.strategies.random import Random
from peftkernels.allocation.strategies.strategy import Strategy
from peftkernels.allocation.strategies.uniform import Uniform

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    **{strategy.name: strategy for strategy in (Uniform, Random, Magnitude, AdaLora, GateGradient)},
    Knapsack.name: lambda: Knapsack(AdaLora()),
    Bandit.name: lambda: Bandit(AdaLora()),
}

__all__ = [
    "STRATEGIES",
    "AdaLora",
    "Bandit",
    "GateGradient",
    "GroupShares",
    "Knapsack",
    "Magnitude",
    "Prior",
    "Random",
    "Uniform",
]
