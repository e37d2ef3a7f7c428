"""Interrupted runs: state_dict, load_state_dict, snapshot, rollback."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from small_models import NAMES, Base, adapt, adapter_layers, averages_of, draw_gradients, masks, trainable
from torch import Tensor, nn

from peftkernels.allocation import AdaLoraAllocator

CONFIG = {"total_step": 40, "target_r": 2, "tinit": 6, "tfinal": 10, "deltaT": 3}
STEPS = 44


class _Run:
    """A training run that can be stopped after any step."""

    def __init__(self, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = adapt(Base(), r=6)
        self.allocator = AdaLoraAllocator(self.model, **CONFIG, **options)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=5e-3)
        self.allocator.attach(self.optimizer)
        self.log: list[tuple[float, dict[str, list[int]]]] = []

    def advance(self, data: Tensor, first: int, last: int) -> None:
        for step in range(first, last):
            loss = self.model(*data[step]).loss + self.allocator.regularization()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.log.append((loss.item(), masks({name: self.model.get_submodule(name) for name in NAMES})))

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "allocator": self.allocator}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.allocator.load_state_dict(state["allocator"])


def _assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same_bits(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            _assert_same_bits(left, right)
    else:
        assert one == other


# Before the first mask, right after a mask, between two masks, before and after the last one, after the end.
@pytest.mark.parametrize("stop", [1, 5, 12, 13, 14, 29, 30, 31, 42])
@pytest.mark.parametrize("compact", [False, True])
def test_resumed_run_equals_uninterrupted_to_the_bit(stop: int, compact: bool) -> None:
    data = torch.randn(STEPS, 2, 8, 24, generator=torch.Generator().manual_seed(0))
    whole = _Run(1, compact=compact)
    whole.advance(data, 0, STEPS)

    first = _Run(1, compact=compact)
    first.advance(data, 0, stop)
    second = _Run(2, compact=compact)
    second.load(first.save())
    second.advance(data, stop, STEPS)

    assert whole.log == first.log + second.log
    _assert_same_bits(whole.model.state_dict(), second.model.state_dict())
    _assert_same_bits(whole.optimizer.state_dict(), second.optimizer.state_dict())
    _assert_same_bits(whole.allocator.state_dict(), second.allocator.state_dict())
    assert str(whole.allocator.explain()) == str(second.allocator.explain())


def test_state_is_a_copy() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2)
    torch.manual_seed(0)
    draw_gradients(layers)
    allocator.step()
    state = allocator.state_dict()
    frozen = copy.deepcopy(state)
    draw_gradients(layers)
    allocator.step()
    _assert_same_bits(state, frozen)
    allocator.load_state_dict(state)
    draw_gradients(layers)
    allocator.step()
    _assert_same_bits(state, frozen)


def test_loading_writes_the_rank_states() -> None:
    """Also where the model's own state was not restored."""
    torch.manual_seed(3)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2)
    for _ in range(6):
        draw_gradients(layers)
        allocator.step()
    expected = masks(layers)
    assert any(1 in states for states in expected.values())
    fresh = adapter_layers((8, 9), (10, 9))
    other = AdaLoraAllocator(fresh, total_step=10, target_r=2)
    other.load_state_dict(allocator.state_dict())
    assert masks(fresh) == expected
    assert other.rank_pattern() == allocator.rank_pattern()


def test_settings_of_another_run_are_refused() -> None:
    saved = AdaLoraAllocator(adapter_layers((8, 9)), total_step=100, target_r=2, deltaT=5).state_dict()
    other = AdaLoraAllocator(adapter_layers((8, 9)), total_step=100, target_r=3, deltaT=10)
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"target_r \(found 2, expected 3\), deltaT \(found 5, expected 10\)"):
        other.load_state_dict(saved)
    _assert_same_bits(other.state_dict(), before)


def test_state_of_other_layers_is_refused() -> None:
    arguments = {"total_step": 100, "target_r": 2}
    saved = AdaLoraAllocator({"a": adapter_layers((8, 9))["layer0"]}, **arguments).state_dict()
    with pytest.raises(ValueError, match=r"other layers.*\('a', 6\), \('b', 6\)"):
        AdaLoraAllocator({"b": adapter_layers((8, 9))["layer0"]}, **arguments).load_state_dict(saved)
    same_rank = AdaLoraAllocator({"a": adapter_layers((8, 10))["layer0"]}, **arguments)
    with pytest.raises(ValueError, match=r"a.lora_A'\]: found \(6, 9\) torch.float32, expected \(6, 10\)"):
        same_rank.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state\['metadata'\]: found NoneType, expected the bytes of state_dict"):
        same_rank.load_state_dict({})


def test_rollback_repeats_the_run_to_the_bit() -> None:
    data = torch.randn(STEPS, 2, 8, 24, generator=torch.Generator().manual_seed(4))
    run = _Run(5)
    run.advance(data, 0, 14)
    token = run.allocator.snapshot()
    moments = copy.deepcopy(run.optimizer.state_dict())
    run.advance(data, 14, STEPS)
    for _ in range(2):
        run.allocator.rollback(token)
        run.optimizer.load_state_dict(copy.deepcopy(moments))
        run.advance(data, 14, STEPS)
    rest = STEPS - 14
    assert run.log[14:STEPS] == run.log[STEPS : STEPS + rest] == run.log[STEPS + rest :]
    assert run.log[14] != run.log[15]


def test_rollback_to_the_start() -> None:
    torch.manual_seed(8)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2)
    token = allocator.snapshot()
    gates = {name: layer.lora_E.detach().clone() for name, layer in layers.items()}
    for _ in range(12):
        draw_gradients(layers)
        allocator.step()
    allocator.rollback(token)
    assert masks(layers) == {name: [2] * 6 for name in layers}
    assert all(torch.equal(layer.lora_E, gates[name]) for name, layer in layers.items())
    assert allocator.explain().step == 0
    assert all(map(all, allocator.rank_pattern().values()))


def test_rollback_checks_its_token() -> None:
    allocator = AdaLoraAllocator(adapter_layers((8, 9)), total_step=10, target_r=2)
    with pytest.raises(TypeError, match="token: found dict"):
        allocator.rollback(allocator.state_dict())
    other = AdaLoraAllocator(adapter_layers((8, 9)), total_step=11, target_r=2)
    with pytest.raises(ValueError, match="total_step"):
        allocator.rollback(other.snapshot())


def test_layers_may_change_precision_between_steps() -> None:
    """The averages stay float32 when the model is cast."""
    torch.manual_seed(6)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(nn.ModuleDict(layers), total_step=10, target_r=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for layer in layers.values():
            layer.to(dtype)
        draw_gradients(layers)
        allocator.step()
    assert all(value.dtype == torch.float32 for value in averages_of(allocator).values())
    assert sum(map(sum, allocator.rank_pattern().values())) == allocator.budget(3)
