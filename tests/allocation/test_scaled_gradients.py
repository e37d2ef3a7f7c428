"""Gradients that are not finite, and scalers that keep the optimizer from stepping."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from saved_runs import Run, assert_same_bits, data
from small_models import adapter_layers, draw_gradients, trainable
from torch import Tensor

from peftkernels.allocation import AdaLoraAllocator, BudgetAllocator, Strategy
from peftkernels.allocation.strategies import STRATEGIES, AdaLora


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_step_is_counted_and_changes_no_statistic(strategy: str, bad: float, capturable: bool) -> None:
    if capturable and not STRATEGIES[strategy]().capturable:
        with pytest.raises(ValueError, match="capturable: found True"):
            BudgetAllocator(adapter_layers((8, 9)), STRATEGIES[strategy](), total_step=9, target_r=2, capturable=True)
        return
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    settings: dict[str, Any] = {"total_step": 20, "target_r": 2, "deltaT": 3, "capturable": capturable}
    allocator = BudgetAllocator(layers, STRATEGIES[strategy](), **settings)
    for _ in range(4):
        draw_gradients(layers)
        allocator.observe(1.0)
        allocator.step()
    before = allocator.strategy.tensors()
    before = {name: value.clone() for name, value in before.items()}
    draw_gradients(layers)
    layers["layer1"].lora_E.grad[2] = bad
    allocator.observe(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        allocator.step()
    assert_same_bits(dict(allocator.strategy.tensors()), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert allocator.nonfinite_steps == 1
    assert allocator.steps == 5
    for _ in range(16):
        draw_gradients(layers)
        allocator.observe(1.0)
        allocator.step()
    assert allocator.nonfinite_steps == 1
    assert "1 steps had gradients that were not finite" in str(allocator.explain())


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_scores_that_are_not_numbers_decide_nothing(capturable: bool, exact_budget: bool) -> None:
    """Magnitudes of weights that are not numbers: the mask before stays, and nobody is told of a decision."""
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    settings: dict[str, Any] = {"total_step": 12, "target_r": 2, "capturable": capturable, "exact_budget": exact_budget}
    allocator = BudgetAllocator(layers, STRATEGIES["magnitude"](), **settings)
    for _ in range(5):
        draw_gradients(layers)
        allocator.step()
    pattern, decision = allocator.rank_pattern(), allocator.decision
    kept = [layer.lora_A.detach().clone() for layer in layers.values()]
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A.fill_(math.nan)
    draw_gradients(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if capturable else "ignore")
        allocator.step()
    assert allocator.rank_pattern() == pattern
    after = allocator.decision
    assert decision is not None and after is not None
    assert (after.step, after.budget) == (decision.step, decision.budget) == (5, allocator.budget(5))
    assert not after.scores.isnan().any()
    with torch.no_grad():
        for layer, before in zip(layers.values(), kept, strict=True):
            layer.lora_A.copy_(before)
    for _ in range(6):
        draw_gradients(layers)
        allocator.step()
    assert sum(map(sum, allocator.rank_pattern().values())) == 4


def test_scores_that_are_not_numbers_are_warned_about() -> None:
    class Broken(Strategy):
        name = "broken"

        def scores(self, statistics: Any) -> Tensor:
            return torch.full((statistics.total,), math.nan)

    layers = adapter_layers((8, 9))
    allocator = BudgetAllocator(layers, Broken(), total_step=9, target_r=2)
    draw_gradients(layers)
    with pytest.warns(UserWarning, match="its scores are not finite or all the same: the mask before stays"):
        allocator.step()
    assert all(allocator.rank_pattern()["layer0"])


def _averages(allocator: BudgetAllocator) -> dict[str, Tensor]:
    return {name: value for name, value in allocator.state_dict().items() if name.startswith("strategy.")}


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True),
    "fused Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_run_scores_as_an_unscaled_one(name: str, capturable: bool) -> None:
    """Scales are powers of two: the gradients that the optimizer saw are the same bits, also where it is the optimizer
    that divides them. A step lost to an overflow leaves the allocator where the run without that batch is."""
    outcomes = []
    for scaled in (False, True):
        torch.manual_seed(0)
        layers = adapter_layers((8, 9), (10, 9))
        allocator = BudgetAllocator(layers, AdaLora(), total_step=20, target_r=2, deltaT=2, capturable=capturable)
        optimizer = OPTIMIZERS[name](trainable(layers))
        allocator.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=100, enabled=scaled)
        for batch in range(12):
            if batch == 5 and not scaled:
                continue
            x = torch.randn(4, 9, generator=torch.Generator().manual_seed(batch))
            loss = sum(layer(x).square().mean() for layer in layers.values())
            scaler.scale(loss).backward()
            if batch == 5:
                layers["layer0"].lora_B.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert allocator.steps == 11
        assert allocator.nonfinite_steps == 0
        # A scaler calls optimizers that divide by the scale themselves at every step, whatever it found.
        called = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert allocator.skipped_steps == (1 if scaled and called else 0)
        outcomes.append((_averages(allocator), allocator.rank_pattern(), [p.detach() for p in trainable(layers)]))
    assert_same_bits(outcomes[1], outcomes[0])


def test_losses_of_a_step_that_was_skipped() -> None:
    """A fused optimizer is called and its step is over; one that is not called has not made the step yet."""
    for name, expected in (("fused AdamW", 3.0), ("AdamW", 2.0)):
        torch.manual_seed(0)
        layers = adapter_layers((8, 9))
        allocator = AdaLoraAllocator(layers, total_step=20, target_r=2)
        optimizer = OPTIMIZERS[name](trainable(layers))
        allocator.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for loss, overflow in ((1.0, True), (3.0, False)):
            scaler.scale(layers["layer0"](torch.randn(4, 9)).square().mean()).backward()
            if overflow:
                layers["layer0"].lora_A.grad[0, 0] = math.inf
            allocator.observe(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert allocator.steps == 1
        assert allocator.statistics.loss is not None
        assert allocator.statistics.loss.item() == expected


@pytest.mark.parametrize("name", ["AdamW", "fused AdamW"])
@pytest.mark.parametrize("attach_first", [False, True])
def test_under_accelerate_with_a_scaler(name: str, attach_first: bool) -> None:
    """accelerate's optimizer with the scaler of fp16, gradients accumulated over two batches."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate's optimizer needs accelerate installed")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        layers = adapter_layers((8, 9), (10, 9))
        model = torch.nn.ModuleDict(layers)
        allocator = AdaLoraAllocator(model, total_step=20, target_r=2)
        inner = OPTIMIZERS[name](trainable(layers))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=100)
        if attach_first:
            allocator.attach(inner)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        if not attach_first:
            allocator.attach(optimizer)
        assert allocator.optimizer is inner
        skipped = []
        for batch in range(12):
            with accelerator.accumulate(model):
                loss = sum(layer(torch.randn(4, 9)).square().mean() for layer in layers.values())
                scaler.scale(loss / 2).backward()
                if batch == 5:
                    layers["layer1"].lora_A.grad[0, 0] = math.inf
                optimizer.step()
                skipped.append(optimizer.step_was_skipped)
                optimizer.zero_grad()
        assert allocator.steps == 5
        assert allocator.nonfinite_steps == 0
        assert allocator.skipped_steps == (1 if name == "fused AdamW" else 0)
        if name == "AdamW":
            assert skipped[5]
        assert all(value.isfinite().all() for value in _averages(allocator).values())
        assert sum(map(sum, allocator.rank_pattern().values())) == allocator.budget(5)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_a_bad_step_costs_the_weights_unless_it_is_stopped() -> None:
    """What the docstring says: the averages are spared, the weights are the optimizer's."""
    batches = data(3)
    run = Run(1, "adalora")
    run.advance(batches[:1])
    run.model(*batches[1][0]).loss.backward()
    run.model.first.lora_A.grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(trainable(run.model), 1.0, error_if_nonfinite=True)
    assert run.allocator.steps == 1
    with pytest.warns(UserWarning, match="not finite"):
        run.optimizer.step()
    assert run.model.first.lora_A.isnan().any()
    assert all(value.isfinite().all() for value in _averages(run.allocator).values())
