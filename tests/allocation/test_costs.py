"""What a rank costs: the logic under a made-up clock, and one measurement of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import adapter_layers
from torch import nn

from peftkernels.allocation import Budget, BudgetAllocator, costs
from peftkernels.allocation.costs import Shape, byte_costs, cost_per_rank, guarded, load_costs, save_costs
from peftkernels.allocation.strategies import AdaLora, Knapsack
from peftkernels.nn import AdaLoRALinear


class Clock:
    """Time that passes only in `run`: `fixed` seconds a call and `each` for a live rank, times a changing load."""

    def __init__(self, fixed: float, each: float, load: list[float] | None = None) -> None:
        self.now = 0.0
        self.fixed, self.each = fixed, each
        self.load = load or [1.0]
        self.calls: list[int] = []

    def __call__(self) -> float:
        return self.now

    def run(self, live: int) -> None:
        self.now += (self.fixed + self.each * live) * self.load[len(self.calls) % len(self.load)]
        self.calls.append(live)


def test_the_slope_is_found_whatever_a_call_costs() -> None:
    for fixed in (1e-4, 1e-2, 1.0):
        clock = Clock(fixed, each=3e-6)
        assert cost_per_rank(clock.run, low=16, high=64, repeats=5, clock=clock) == pytest.approx(3e-6, rel=1e-6)


def test_a_disturbed_round_does_not_count() -> None:
    clock = Clock(1e-2, each=3e-6, load=[1.0] * 40 + [5.0])
    assert cost_per_rank(clock.run, low=16, high=64, repeats=11, clock=clock) == pytest.approx(3e-6, rel=1e-6)


def test_a_machine_that_slows_down_cancels_out() -> None:
    drift = [1.0 + 1e-3 * call for call in range(100)]
    clock = Clock(0.1, each=3e-6, load=drift)
    # What a fixed order would add to the difference of every round.
    assert 1e-3 * clock.fixed / 48 > 0.5 * clock.each
    found = cost_per_rank(clock.run, low=16, high=64, repeats=20, clock=clock)
    assert found == pytest.approx(3e-6, rel=0.1)


def test_turns_alternate() -> None:
    clock = Clock(1.0, each=1e-3)
    cost_per_rank(clock.run, low=2, high=8, repeats=4, clock=clock)
    assert clock.calls[-8:] == [8, 2, 2, 8, 8, 2, 2, 8]


def shape(n: int, k: int) -> Shape:
    return Shape(n, k, torch.float32, torch.float32, 8, "cpu", 1)


def test_a_cost_lost_in_noise_is_taken_from_the_others() -> None:
    with pytest.warns(UserWarning, match=r"\(5, 4\) adds is lost in noise"):
        found = guarded({shape(5, 4): -1.0, shape(9, 10): 2.0}, {shape(19, 20): 8.0})
    assert found == {shape(9, 10): 2.0, shape(5, 4): pytest.approx(10 * (0.1 + 0.2) / 2)}
    with pytest.raises(RuntimeError, match=r"no time that a rank of \(5, 4\) adds"):
        guarded({shape(5, 4): 0.0}, {})


def test_each_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(asked_for: Shape, repeats: int) -> float:
        asked.append((asked_for.n, asked_for.k, asked_for.rows))
        return float(len(asked))

    monkeypatch.setattr(costs, "_measured", {})
    monkeypatch.setattr(costs, "_measure", measure)
    layers = adapter_layers((5, 4), (9, 4), (5, 4))
    assert costs.measured_costs(layers, rows=8) == {"layer0": 1.0, "layer1": 2.0, "layer2": 1.0}
    assert costs.measured_costs(layers, rows=8) == {"layer0": 1.0, "layer1": 2.0, "layer2": 1.0}
    assert costs.measured_costs(layers, rows=16)["layer0"] == 3.0
    assert costs.measured_costs(layers, rows=8, fresh=True)["layer1"] == 6.0
    assert asked == [(5, 4, 8), (9, 4, 8), (5, 4, 16), (9, 4, 16), (5, 4, 8), (9, 4, 8)]


def test_this_machine_is_measured(tmp_path: Path) -> None:
    layers = {
        "wide": AdaLoRALinear.from_linear(nn.Linear(512, 1024), 8),
        "narrow": AdaLoRALinear.from_linear(nn.Linear(32, 32), 8),
    }
    before = torch.random.get_rng_state()
    found = costs.measured_costs(layers, rows=256)
    assert torch.equal(torch.random.get_rng_state(), before)
    # 24 times the numbers: noise does not reach so far.
    assert found["wide"] > found["narrow"] > 0

    save_costs(found, tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == found
    budget = Budget(4 * found["wide"], "microseconds")
    allocator = BudgetAllocator(layers, Knapsack(AdaLora()), total_step=2, budget=budget, costs=found)
    for _ in range(2):
        for layer in layers.values():
            for parameter in (layer.lora_A, layer.lora_B, layer.lora_E):
                parameter.grad = torch.ones_like(parameter)
        allocator.step()
    kept = allocator.rank_pattern()
    assert 0 < sum(sum(kept[name]) * found[name] for name in kept) <= 4 * found["wide"] * (1 + 1e-9)


def test_bytes() -> None:
    layers = {"single": AdaLoRALinear.from_linear(nn.Linear(5, 7), 2), **adapter_layers((5, 4), dtype=torch.float64)}
    assert byte_costs(layers) == {"single": 13 * 4.0, "layer0": 10 * 8.0}
    assert byte_costs(layers, copies=4)["single"] == 4 * 13 * 4.0
    allocator = BudgetAllocator(
        layers, Knapsack(AdaLora()), total_step=2, budget=Budget(100, "bytes"), costs=byte_costs(layers)
    )
    assert allocator.budget(0) == 2 * 52 + 6 * 80
    allocator.close()
    with pytest.raises(ValueError, match=r"costs: found None, expected bytes by layer .*byte_costs\(model\)"):
        BudgetAllocator(layers, AdaLora(), total_step=2, budget=Budget(100, "bytes"))


def test_a_run_is_resumed_with_the_costs_it_had() -> None:
    layers = adapter_layers((5, 4), (6, 4))

    def allocator(given: dict[str, float]) -> BudgetAllocator:
        return BudgetAllocator(layers, AdaLora(), total_step=2, budget=Budget(9, "microseconds"), costs=given)

    state = allocator({"layer0": 1.5, "layer1": 2.5}).state_dict()
    allocator({"layer0": 1.5, "layer1": 2.5}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"other settings: costs \(found .*'layer1': 2\.5.*, expected .*2\.6"):
        allocator({"layer0": 1.5, "layer1": 2.6}).load_state_dict(state)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save_costs({"a": 1.5}, path)
    with pytest.raises(ValueError, match="Out of range"):
        save_costs({"a": float("inf")}, path)
    assert load_costs(path) == {"a": 1.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "found no JSON"),
        (json.dumps({"kind": "something"}), "found 'something', expected 'peftkernels costs'"),
        (
            json.dumps({"kind": "peftkernels costs", "costs": {"a": -1.0}}),
            r"costs\['a'\]: found -1.0, expected a number above 0",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_costs(tmp_path / "costs.json")


def test_wrong_arguments_are_named() -> None:
    layers = adapter_layers((5, 4))
    with pytest.raises(TypeError, match=r"rows: found 1\.5"):
        costs.measured_costs(layers, rows=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repeats: found 0"):
        costs.measured_costs(layers, repeats=0)
    with pytest.raises(ValueError, match="copies: found 0"):
        byte_costs(layers, copies=0)
