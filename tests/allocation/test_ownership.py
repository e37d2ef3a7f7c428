"""A layer has one allocator at a time."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from small_models import adapter_layers, draw_gradients, trainable
from torch import nn

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.nn import AdaLoRALinear

REFUSED = r"layers\['layer1'\]: found an allocator that decides its ranks already, expected none; call close\(\)"


def made(layers: object) -> AdaLoraAllocator:
    return AdaLoraAllocator(layers, total_step=8, tfinal=2, target_r=2)  # type: ignore[arg-type]


def test_a_second_allocator_is_refused_before_it_touches_a_layer() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    first = made({"layer1": layers["layer1"]})
    for _ in range(7):
        draw_gradients({"layer1": layers["layer1"]})
        first.step()
    states = layers["layer1"].rank_state.clone()
    with pytest.raises(ValueError, match=REFUSED):
        made(layers)
    assert torch.equal(layers["layer1"].rank_state, states)
    # Layers of the one that was refused are free.
    made({"layer0": layers["layer0"]})


def test_the_same_layer_under_another_name_and_inside_a_model() -> None:
    layers = adapter_layers((8, 9))
    first = made(layers)
    with pytest.raises(ValueError, match=r"layers\['0'\]: found an allocator"):
        made(nn.Sequential(layers["layer0"]))
    assert first.steps == 0


def test_close_hands_the_layers_over() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    optimizer = torch.optim.SGD(trainable(layers), 0.1)
    first = made(layers)
    first.attach(optimizer)
    first.close()
    first.close()
    second = made(layers)
    second.attach(optimizer)
    draw_gradients(layers)
    optimizer.step()
    assert (first.steps, second.steps) == (0, 1)
    state, token = second.state_dict(), second.snapshot()
    for change in (
        first.step,
        lambda: first.attach(optimizer),
        lambda: first.load_state_dict(state),
        lambda: first.freeze("layer0"),
        lambda: first.rollback(token),
    ):
        with pytest.raises(RuntimeError, match="the allocator was closed"):
            change()
    assert sum(map(sum, first.rank_pattern().values())) == 12
    # It does not take the layers from the other when it is closed once more.
    first.close()
    with pytest.raises(ValueError, match="found an allocator that decides its ranks already"):
        made(layers)


def test_an_allocator_that_nobody_holds_has_no_layers() -> None:
    layers = adapter_layers((8, 9))
    first = made(layers)
    first.itself = first  # type: ignore[attr-defined]
    gc.disable()
    try:
        del first
        made(layers)
    finally:
        gc.enable()


def test_an_optimizer_that_steps_an_allocator_holds_it() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    optimizer = torch.optim.SGD(trainable(layers), 0.1)
    made(layers).attach(optimizer)
    with pytest.raises(ValueError, match=r"found an allocator that decides its ranks already"):
        made(layers)
    del optimizer
    gc.collect()
    made(layers)


def test_one_whose_making_failed_has_no_layers() -> None:
    layers = adapter_layers((8, 9))
    with pytest.raises(ValueError, match="target_r") as error:
        AdaLoraAllocator(layers, total_step=8, target_r=7)
    made(layers)
    assert error.traceback


def test_copies_of_layers_have_allocators_of_their_own() -> None:
    model = nn.Sequential(AdaLoRALinear.from_linear(nn.Linear(8, 9), 6))
    first = made(model)
    twin = copy.deepcopy(model)
    second = made(twin)
    draw_gradients({"layer": twin[0]})
    second.step()
    assert first.steps == 0
