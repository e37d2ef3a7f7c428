"""What goes wrong in training loops: bad gradients, forgotten calls, wrong arguments."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from small_models import Base, adapt, adapter_layers, averages_of, draw_gradients, masks, trainable
from torch import nn

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.backends.eager.allocation import smooth


def _flat(allocator: AdaLoraAllocator) -> torch.Tensor:
    return torch.cat([value.flatten() for value in averages_of(allocator).values()])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_E"])
def test_a_step_with_bad_gradients_leaves_the_scores(bad: float, factor: str) -> None:
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=30, target_r=2, deltaT=5)
    draw_gradients(layers)
    allocator.step()
    before = _flat(allocator)
    draw_gradients(layers)
    getattr(layers["layer1"], factor).grad.view(-1)[0] = bad
    with pytest.warns(UserWarning, match="gradients that are not finite"):
        allocator.step()
    assert torch.equal(_flat(allocator), before)
    assert allocator.nonfinite_steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.step()
        assert allocator.nonfinite_steps == 2
        draw_gradients(layers)
        allocator.step()
    assert allocator.nonfinite_steps == 2
    assert not torch.equal(_flat(allocator), before)
    assert _flat(allocator).isfinite().all()
    # The schedule goes on: the bad steps were steps.
    draw_gradients(layers)
    allocator.step()
    assert allocator.explain().decided_at == 5
    assert "2 steps had gradients" in str(allocator.explain())


def test_a_bad_step_costs_nothing_but_itself() -> None:
    """Left out of a run, the scores are those of the run without it."""
    torch.manual_seed(1)
    layers = adapter_layers((8, 9))
    twins = copy.deepcopy(layers)
    with_bad = AdaLoraAllocator(layers, total_step=30, target_r=2, deltaT=40)
    without = AdaLoraAllocator(twins, total_step=30, target_r=2, deltaT=40)
    for step in range(6):
        draw_gradients(layers)
        for parameter, twin in zip(trainable(layers), trainable(twins), strict=True):
            twin.grad = parameter.grad.clone()
        without.step()
        with_bad.step()
        if step == 2:
            layers["layer0"].lora_A.grad.fill_(math.nan)
            with pytest.warns(UserWarning, match="not finite"):
                with_bad.step()
    assert torch.equal(_flat(with_bad), _flat(without))


def test_the_guard_of_accelerators_gives_the_same_bits() -> None:
    """There the choice is made by the device instead of the host; the arithmetic is run here on the CPU."""
    torch.manual_seed(2)
    value, average, scratch = torch.rand(200), torch.rand(200), torch.empty(200)
    on_host, on_device, unchanged = average.clone(), average.clone(), average.clone()
    smooth(on_host, value, 0.85, scratch, None)
    smooth(on_device, value, 0.85, scratch, torch.tensor(True))
    smooth(unchanged, torch.full_like(value, math.nan), 0.85, scratch, torch.tensor(False))
    assert torch.equal(on_host, on_device)
    assert torch.equal(unchanged, average)
    assert not torch.equal(on_host, average)


def test_a_missing_gradient_counts_as_zero() -> None:
    torch.manual_seed(3)
    layers = adapter_layers((8, 9), (10, 9))
    both = (layers, copy.deepcopy(layers))
    allocators = [AdaLoraAllocator(own, total_step=30, target_r=2, deltaT=40) for own in both]
    for allocator, layers, clear in zip(allocators, both, ("none", "zero"), strict=True):
        torch.manual_seed(4)
        draw_gradients(layers)
        allocator.step()
        for factor in ("lora_A", "lora_B", "lora_E"):
            parameter = getattr(layers["layer1"], factor)
            parameter.grad = None if clear == "none" else torch.zeros_like(parameter)
        if clear == "none":
            with pytest.warns(UserWarning, match=r"no gradient on layer1\.lora_A, layer1\.lora_B, layer1\.lora_E:"):
                allocator.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            allocator.step()
    # The one that saw None did one step more; bring the other level.
    allocators[1].step()
    assert torch.equal(_flat(allocators[0]), _flat(allocators[1]))


def test_no_gradient_at_all_raises_and_changes_nothing() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=30, target_r=2)
    draw_gradients(layers)
    allocator.step()
    before = _flat(allocator)
    for parameter in trainable(layers):
        parameter.grad = None
    with pytest.raises(RuntimeError, match="before the gradients are cleared"):
        allocator.step()
    assert torch.equal(_flat(allocator), before)
    assert allocator.explain().step == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_step": 0}, ValueError, "total_step: found 0, expected at least 1"),
        ({"total_step": 10.0}, TypeError, r"total_step: found 10.0 \(float\), expected an int"),
        ({"total_step": True}, TypeError, r"total_step: found True \(bool\)"),
        ({"target_r": 0}, ValueError, "target_r: found 0, expected at least 1"),
        ({"target_r": 6}, ValueError, "target_r: found 6, expected less than the smallest initial rank, 6 of layer"),
        ({"tinit": -1}, ValueError, "tinit: found -1"),
        ({"tinit": 80, "tfinal": 20}, ValueError, "tinit: found 80, expected less than total_step - tfinal = 80"),
        ({"tfinal": -1}, ValueError, "tfinal: found -1"),
        ({"tfinal": 99}, ValueError, r"tfinal: found 99 with total_step=100, expected at most total_step - 2"),
        ({"deltaT": 0}, ValueError, "deltaT: found 0, expected at least 1"),
        ({"beta1": 0.0}, ValueError, "beta1: found 0.0, expected a number above 0 and below 1"),
        ({"beta2": 1}, ValueError, "beta2: found 1, expected a number above 0 and below 1"),
        ({"beta1": math.nan}, ValueError, "beta1: found nan"),
        ({"beta2": "0.8"}, TypeError, "beta2: found '0.8'"),
        ({"orth_reg_weight": -0.1}, ValueError, "orth_reg_weight: found -0.1"),
        ({"orth_reg_weight": math.inf}, ValueError, "orth_reg_weight: found inf"),
        ({"exact_budget": 1}, TypeError, "exact_budget: found 1"),
        ({"compact": None}, TypeError, "compact: found None"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaLoraAllocator(adapter_layers((8, 9), (10, 9)), **{"total_step": 100, "target_r": 2, **arguments})


def test_layers_are_checked() -> None:
    layer = adapter_layers((8, 9))["layer0"]
    cases: list[tuple[Any, type[Exception], str]] = [
        (nn.Sequential(nn.Linear(3, 3)), ValueError, "model: found no AdaLoRALinear layer in Sequential"),
        ({}, ValueError, "layers: found an empty mapping"),
        ([layer], TypeError, "model: found list"),
        ({"a": nn.Linear(3, 3)}, TypeError, r"layers\['a'\]: found Linear, expected an AdaLoRALinear"),
        ({3: layer}, TypeError, "layers: found the name 3, expected a str"),
        ({"a": layer, "b": layer}, ValueError, r"layers\['b'\]: found the layer given as 'a' too"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            AdaLoraAllocator(source, total_step=10, target_r=2)
    with torch.no_grad():
        layer.lora_B = nn.Parameter(torch.zeros(8, 5))
    with pytest.raises(ValueError, match=r"lora_B \(8, 5\).*expected \(r, K\), \(N, r\) and \(r, 1\)"):
        AdaLoraAllocator({"a": layer}, total_step=10, target_r=2)
    away = {"a": adapter_layers((8, 9))["layer0"], "b": adapter_layers((8, 9))["layer0"].to("meta")}
    with pytest.raises(ValueError, match="expected all of them on one device"):
        AdaLoraAllocator(away, total_step=10, target_r=2)


def test_step_numbers_are_checked() -> None:
    layers = adapter_layers((8, 9))
    draw_gradients(layers)
    allocator = AdaLoraAllocator(layers, total_step=30, target_r=2, tfinal=10)
    with pytest.raises(ValueError, match="step: found 0, expected more than the last step, 0; steps count from 1"):
        allocator.step(0)
    with pytest.raises(ValueError, match="step: found 20 as the first, expected less than 20"):
        allocator.step(20)
    allocator.step(3)
    with pytest.raises(ValueError, match="step: found 3, expected more than the last step, 3"):
        allocator.step(3)
    with pytest.raises(TypeError, match=r"step: found 4\.0"):
        allocator.step(4.0)
    allocator.step()
    assert allocator.explain().step == 4
    # A jump over the last allocation makes up for it.
    allocator.step(25)
    assert allocator.explain().decided_at == 25
    assert sum(allocator.rank_pattern()["layer0"]) == 2


def test_attach_runs_after_every_optimizer_step_until_detached() -> None:
    torch.manual_seed(5)
    model = adapt(Base())
    allocator = AdaLoraAllocator(model, total_step=20, target_r=2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached to an optimizer already"):
        allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="whose hook steps it"):
        allocator.step()
    for step in range(1, 6):
        model(torch.randn(4, 24), torch.randn(4, 24)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert allocator.explain().step == step
    assert any(1 in states for states in masks(dict(model.named_children())).values())
    allocator.detach()
    allocator.detach()
    model(torch.randn(4, 24), torch.randn(4, 24)).loss.backward()
    optimizer.step()
    assert allocator.explain().step == 5
    allocator.step()
    assert allocator.explain().step == 6
    allocator.attach(optimizer)
    optimizer.step()
    assert allocator.explain().step == 7


def test_attach_names_what_the_optimizer_misses() -> None:
    model = adapt(Base())
    allocator = AdaLoraAllocator(model, total_step=20, target_r=2)
    partial = torch.optim.SGD([model.first.lora_A, model.first.lora_B, *trainable(model.second)], lr=0.1)
    expected = (
        "without first.lora_E, third.lora_A, third.lora_B, third.lora_E, expected every lora_A, lora_B and lora_E"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        allocator.attach(partial)
    with pytest.raises(TypeError, match=r"optimizer: found Base, expected a torch\.optim\.Optimizer"):
        allocator.attach(model)
    # A refused attach leaves nothing behind.
    draw_gradients({name: model.get_submodule(name) for name in ("first", "second", "third")})
    partial.step()
    assert allocator.explain().step == 0
    allocator.step()


def test_attach_looks_through_a_wrapper_that_is_not_stepped() -> None:
    """accelerate's AcceleratedOptimizer is an Optimizer by class only: hooks registered on it would never run."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2)
    optimizer = Wrapper(torch.optim.SGD(trainable(layers), lr=0.1))
    allocator.attach(optimizer)
    draw_gradients(layers)
    optimizer.step()
    assert allocator.explain().step == 1


def _iterate(layers: dict, allocator: AdaLoraAllocator, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        allocator.regularization().backward()
        layers["layer0"].lora_E.grad = torch.ones_like(layers["layer0"].lora_E)
        optimizer.step()
        optimizer.zero_grad()


def test_a_forgotten_allocator_is_noticed() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2)
    optimizer = torch.optim.SGD(trainable(layers), lr=1e-3)
    with pytest.warns(UserWarning, match=r"the allocator is not stepped.*attach\(optimizer\)") as caught:
        _iterate(layers, allocator, optimizer, 6)
    assert len(caught) == 1


def test_a_wrong_optimizer_is_noticed() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2)
    allocator.attach(torch.optim.SGD(trainable(layers), lr=1e-3))
    with pytest.warns(UserWarning, match="the optimizer the allocator is attached to is not stepped"):
        _iterate(layers, allocator, torch.optim.SGD(trainable(layers), lr=1e-3), 4)


def test_no_false_alarms() -> None:
    layers = adapter_layers((8, 9))
    model = nn.ModuleDict(layers)
    allocator = AdaLoraAllocator(layers, total_step=200, target_r=2)
    optimizer = torch.optim.AdamW(trainable(layers), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A loop that steps by hand.
        for _ in range(3):
            allocator.regularization().backward()
            layers["layer0"].lora_E.grad = torch.ones_like(layers["layer0"].lora_E)
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()
        # Checkpoints, precision and averaged weights swapped in and out between steps.
        saved = {"model": model.state_dict(), "allocator": allocator.state_dict()}
        for _ in range(3):
            model.load_state_dict(saved["model"])
            allocator.regularization()
            allocator.load_state_dict(saved["allocator"])
            allocator.regularization()
        allocator.attach(optimizer)
        for _ in range(3):
            own = layers["layer0"].lora_E.detach().clone()
            with torch.no_grad():
                layers["layer0"].lora_E.copy_(own * 0.9)
                allocator.explain()
                layers["layer0"].lora_E.copy_(own)
            _iterate(layers, allocator, optimizer, 1)
        # Several forward passes for one optimizer step, and reading in between.
        for _ in range(5):
            allocator.regularization()
            allocator.rank_pattern()
            allocator.state_dict()
