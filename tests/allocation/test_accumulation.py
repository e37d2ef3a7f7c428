"""The noise scale of gradients whose noise is known, and what it proposes."""

from __future__ import annotations

import pytest
import torch
from small_models import adapter_layers, trainable

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.policies.accumulation import NoiseScale
from peftkernels.allocation.strategies import Magnitude


def fed(
    noise: NoiseScale,
    layers: dict,
    deviation: float,
    *,
    steps: int,
    count: int = 4,
    rows: int = 8,
    divide: bool = False,
) -> None:
    """Gradients of a row: 1 for each of the gates, with independent noise; so |G|² = 18 and tr Σ = 18·deviation²."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 / count if divide else 1.0
    for _ in range(steps):
        for layer in layers.values():
            layer.lora_E.grad = None
        for _ in range(count):
            for layer in layers.values():
                drawn = 1 + deviation * rows**-0.5 * torch.randn(6, 1, generator=generator)
                layer.lora_E.grad = scale * drawn + (0 if layer.lora_E.grad is None else layer.lora_E.grad)
            noise.micro_batch(rows, scale)
        noise()


@pytest.mark.parametrize("deviation", [1.0, 5.0, 12.0])
@pytest.mark.parametrize(("count", "divide"), [(2, False), (4, True), (8, False)])
def test_a_known_noise_scale_is_found(deviation: float, count: int, divide: bool) -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    noise = NoiseScale(layers, beta=0.999)
    fed(noise, layers, deviation, steps=1500, count=count, divide=divide)
    # Five deviations of the least certain case: a few ten thousand draws.
    assert noise.value == pytest.approx(deviation**2, rel=0.1)


def test_the_number_of_rows_of_a_micro_batch_does_not_matter() -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    values = []
    for rows in (1, 32):
        noise = NoiseScale(layers, beta=0.999)
        fed(noise, layers, 5.0, steps=1000, rows=rows)
        values.append(noise.value)
    assert values == pytest.approx([25.0, 25.0], rel=0.15)


def test_accumulation_follows_the_noise_within_bounds() -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    noise = NoiseScale(layers, beta=0.999)
    assert noise.value is None
    assert noise.accumulation(most=16) == 2
    fed(noise, layers, 8.0, steps=1000, rows=8)
    assert noise.accumulation(most=16) == 8
    assert noise.accumulation(most=4) == 4
    assert noise.accumulation(most=16, least=12) == 12


def test_without_noise_the_fewest_and_without_a_gradient_the_most() -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    noise = NoiseScale(layers)
    fed(noise, layers, 0.0, steps=3)
    assert noise.value == pytest.approx(0.0, abs=1e-5)
    assert noise.accumulation(most=16) == 2
    opposite = NoiseScale(layers)
    for layer in layers.values():
        layer.lora_E.grad = torch.ones_like(layer.lora_E)
    opposite.micro_batch(8)
    for layer in layers.values():
        layer.lora_E.grad = torch.zeros_like(layer.lora_E)
    opposite.micro_batch(8)
    opposite()
    assert opposite.value == float("inf")
    assert opposite.accumulation(most=16) == 16


def test_steps_that_say_nothing_are_left_out() -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    noise = NoiseScale(layers)
    fed(noise, layers, 5.0, steps=20)
    before = noise.state_dict()["means"]
    fed(noise, layers, 50.0, steps=1, count=1)
    noise.micro_batch(8)
    noise.micro_batch(4)
    noise()
    fed(noise, layers, float("nan"), steps=1)
    noise()
    assert torch.equal(noise.state_dict()["means"], before)
    fed(noise, layers, 50.0, steps=1)
    assert not torch.equal(noise.state_dict()["means"], before)


def test_it_sees_the_gradients_that_a_backward_pass_accumulates() -> None:
    """As a callback of an allocator, between backward passes and the optimizer's step."""
    torch.manual_seed(0)
    layers = adapter_layers((5, 4), r=6)
    allocator = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=2)
    optimizer = torch.optim.SGD(trainable(layers), lr=0.0)
    allocator.attach(optimizer)
    noise = NoiseScale(layers)
    allocator.add_callback(noise)
    gradients = []
    for x in torch.randn(3, 8, 4):
        loss = layers["layer0"](x).square().mean()
        gradients.append(torch.autograd.grad(loss, layers["layer0"].lora_E, retain_graph=True)[0].double())
        (loss / 3).backward()
        noise.micro_batch(8, scale=1 / 3)
    optimizer.step()
    stacked = torch.stack(gradients).flatten(1)
    small, big = stacked.square().sum(1).mean(), stacked.mean(0).square().sum()
    expected = 8 * (small - big) / (1 - 1 / 3) / ((3 * big - small) / 2)
    assert noise.value == pytest.approx(float(expected), rel=1e-4)


def test_a_resumed_estimate_goes_on() -> None:
    layers = adapter_layers((5, 4), (6, 4), (7, 4))
    noise = NoiseScale(layers)
    fed(noise, layers, 5.0, steps=10)
    other = NoiseScale(layers)
    other.load_state_dict(noise.state_dict())
    fed(noise, layers, 3.0, steps=5)
    fed(other, layers, 3.0, steps=5)
    assert other.value == noise.value
    assert other.accumulation(most=64) == noise.accumulation(most=64)


def test_wrong_arguments_are_named() -> None:
    noise = NoiseScale(adapter_layers((5, 4)))
    with pytest.raises(ValueError, match="rows: found 0"):
        noise.micro_batch(0)
    with pytest.raises(ValueError, match="scale: found 0"):
        noise.micro_batch(1, scale=0)
    with pytest.raises(ValueError, match="least, most: found 3 and 2"):
        noise.accumulation(most=2, least=3)
    with pytest.raises(ValueError, match="beta: found 1"):
        NoiseScale(adapter_layers((5, 4)), beta=1.0)
