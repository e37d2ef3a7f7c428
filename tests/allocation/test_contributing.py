"""The strategy that CONTRIBUTING.md shows is a whole one, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from planted import TRUE_RANKS, Planted, ranks_found
from small_models import adapter_layers, draw_gradients

from peftkernels.allocation import BudgetAllocator, Strategy

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def shown() -> str:
    section = GUIDE.read_text(encoding="utf-8").split("## Add an allocation strategy")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


def strategy() -> Strategy:
    names: dict = {"__name__": "shown"}
    exec(compile(shown(), "CONTRIBUTING.md", "exec"), names)
    return names["SmoothMagnitude"]()


def test_it_is_short() -> None:
    assert len([line for line in shown().splitlines() if line.strip()]) < 30


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_planted_ranks(seed: int) -> None:
    assert ranks_found(strategy(), Planted(seed=seed)) == list(TRUE_RANKS)


def test_its_state_is_saved_and_resumed() -> None:
    states = []
    for resumed in (False, True):
        torch.manual_seed(0)
        layers = adapter_layers((5, 4), (4, 5))
        allocator = BudgetAllocator(layers, strategy(), total_step=20, target_r=2)
        for step in range(8):
            if step == 4 and resumed:
                saved = allocator.state_dict()
                allocator.close()
                allocator = BudgetAllocator(layers, strategy(), total_step=20, target_r=2)
                allocator.load_state_dict(saved)
            draw_gradients(layers)
            allocator.step()
        states.append(allocator.state_dict())
    assert states[0]["strategy.average"].any()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
