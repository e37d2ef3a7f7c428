"""Freezing of layers: when, in what order, and that the backward pass ends at a frozen prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import Planted, train
from small_models import adapter_layers, trainable
from torch import nn

from peftkernels.allocation import Budget, BudgetAllocator
from peftkernels.allocation.policies.freezing import LayerFreezing
from peftkernels.allocation.strategies import AdaLora, Magnitude
from peftkernels.ops.rank_plan import RankState


def frozen_at(policy: LayerFreezing, fall_at: tuple[int | None, ...], steps: int = 60) -> dict[str, int]:
    """When each of some layers is frozen whose gates' gradients are 1 until a step, and 0 after it."""
    layers = adapter_layers(*[(5, 4)] * len(fall_at), r=4)
    allocator = BudgetAllocator(layers, Magnitude(), total_step=1000, target_r=2, tinit=900)
    allocator.add_callback(policy)
    seen: dict[str, int] = {}
    for step in range(1, steps + 1):
        for (name, layer), fall in zip(layers.items(), fall_at, strict=True):
            if name not in allocator.frozen:
                for parameter in trainable(layer):
                    parameter.grad = torch.full_like(parameter, float(fall is None or step <= fall))
        allocator.step()
        seen.update({name: step for name in allocator.frozen if name not in seen})
    return seen


def test_a_module_is_frozen_when_its_gradients_have_stayed_low() -> None:
    """After step 20 the mean is 0.9ⁿ·(1 - 0.9²⁰)/(1 - 0.9²⁰⁺ⁿ), below a tenth from n = 21 on: steps 41 to 45."""
    assert frozen_at(LayerFreezing(below=0.1, patience=5), (20, None, None)) == {"layer0": 45}
    assert frozen_at(LayerFreezing(below=0.1, patience=10), (20, None, None)) == {"layer0": 50}
    assert frozen_at(LayerFreezing(below=0.05, patience=5), (None, 20, None)) == {"layer1": 52}


def test_a_prefix_is_frozen_from_the_input_on() -> None:
    falls = (25, 20, None, 20, None)
    anywhere = frozen_at(LayerFreezing(patience=5), falls)
    assert anywhere == {"layer0": 51, "layer1": 45, "layer3": 45}
    assert frozen_at(LayerFreezing(patience=5, mode="prefix"), falls) == {"layer0": 51, "layer1": 51}


def test_the_last_modules_are_never_frozen() -> None:
    falls = (20, 20, 20)
    assert frozen_at(LayerFreezing(patience=5), falls) == {"layer0": 45, "layer1": 45}
    assert frozen_at(LayerFreezing(patience=5, at_least=2), falls) == {"layer0": 45}


@pytest.mark.parametrize("keep", [False, True])
def test_frozen_ranks_are_dead_or_kept(keep: bool) -> None:
    layers = adapter_layers((5, 4), (5, 4), r=4)
    allocator = BudgetAllocator(layers, Magnitude(), total_step=1000, target_r=2, tinit=900)
    allocator.add_callback(LayerFreezing(patience=1, start=2, keep=keep))
    gates = layers["layer0"].lora_E.detach().clone()
    for step in range(40):
        for parameter in trainable(layers):
            parameter.grad = torch.full_like(parameter, float(step < 5))
        allocator.step()
    assert allocator.frozen == ("layer0",)
    state = RankState.ACTIVE if keep else RankState.DEAD
    assert layers["layer0"].rank_state.tolist() == [state] * 4
    assert torch.equal(layers["layer0"].lora_E, gates if keep else torch.zeros_like(gates))


def nodes(root: Any) -> list[Any]:
    """All nodes of an autograd graph."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_backward_ends_at_a_frozen_prefix(keep: bool) -> None:
    layers = adapter_layers((8, 8), (8, 8), (8, 8), r=2)
    model = nn.Sequential(*layers.values())
    allocator = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=1)
    x = torch.randn(3, 8)
    whole = nodes(model(x).sum().grad_fn)
    for name in ("layer0", "layer1"):
        allocator.freeze(name, drop=not keep)
    assert not model[1](model[0](x)).requires_grad
    rest = nodes(model(x).sum().grad_fn)
    reached = {node.variable for node in rest if hasattr(node, "variable")}
    assert reached == set(trainable(layers["layer2"]))
    assert len(rest) < len(whole)

    # In the middle nothing ends: gradients must pass.
    others = adapter_layers((8, 8), (8, 8), r=2)
    middle = BudgetAllocator(others, Magnitude(), total_step=9, target_r=1)
    middle.freeze("layer1")
    assert others["layer1"](others["layer0"](x)).requires_grad


def test_a_planted_target_is_learned_with_frozen_layers_too() -> None:
    losses = []
    for policy in (None, LayerFreezing(below=0.2, patience=10, start=40, mode="prefix", keep=True)):
        problem = Planted()
        allocator = BudgetAllocator(
            problem.student, AdaLora(), total_step=300, budget=Budget(problem.total), tinit=60, tfinal=60
        )
        optimizer = torch.optim.AdamW(problem.parameters, lr=2e-2, weight_decay=0.0)
        allocator.attach(optimizer)
        if policy is not None:
            allocator.add_callback(policy)
        losses.append(train(problem, allocator, optimizer, 300))
    frozen = allocator.frozen
    assert frozen and frozen == tuple(f"layers.{layer}" for layer in range(len(frozen)))
    # A hundredth of what was to be learned.
    assert losses[1][-1] < 0.01 * losses[1][0]
    assert losses[0][-1] < 0.01 * losses[0][0]


def test_a_resumed_policy_freezes_at_the_same_step() -> None:
    first = LayerFreezing(patience=5)
    layers = adapter_layers((5, 4), (5, 4), r=4)
    allocator = BudgetAllocator(layers, Magnitude(), total_step=1000, target_r=2, tinit=900)
    allocator.add_callback(first)
    frozen = {}
    for step in range(1, 60):
        if step == 43:
            saved, policy_state = allocator.state_dict(), first.state_dict()
            allocator.close()
            allocator = BudgetAllocator(layers, Magnitude(), total_step=1000, target_r=2, tinit=900)
            allocator.load_state_dict(saved)
            second = LayerFreezing(patience=5)
            second.load_state_dict(policy_state)
            allocator.add_callback(second)
        for parameter in trainable(layers):
            parameter.grad = torch.full_like(parameter, float(step <= 20))
        allocator.step()
        frozen.update({name: step for name in allocator.frozen if name not in frozen})
    assert frozen == {"layer0": 45}


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"mode": "suffix"}, "mode: found 'suffix'"),
        ({"below": 1.0}, r"below: found 1\.0"),
        ({"patience": 0}, "patience: found 0"),
        ({"at_least": 0}, "at_least: found 0"),
        ({"beta": 1.0}, r"beta: found 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerFreezing(**options)
