"""Whatever is missing from a saved state, or is of another kind: it is refused, and the allocator is what it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from saved_runs import assert_same_bits
from small_models import adapter_layers, draw_gradients, masks
from torch import Tensor, nn

from peftkernels.allocation import AdaLoraAllocator, BudgetAllocator
from peftkernels.nn import AdaLoRALinear

WRONG = (None, -1, True, 1.5, float("nan"), float("inf"), 10**30, "x", [], ["x"], {}, {"x": 1}, "missing")


def _allocator(steps: int) -> tuple[BudgetAllocator, dict[str, AdaLoRALinear]]:
    torch.manual_seed(steps)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=10, target_r=2, tinit=1, tfinal=2)
    for _ in range(steps):
        draw_gradients(layers)
        allocator.step()
    return allocator, layers


def _with_facts(state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
    return {**state, "metadata": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}


def _changed() -> list[tuple[str, dict[str, Tensor]]]:
    """A good state with each fact and each tensor missing or replaced."""
    state = _allocator(4)[0].state_dict()
    facts = json.loads(bytes(state["metadata"].tolist()))
    assert facts["decision"] is not None
    found = []
    places = [(name,) for name in facts] + [("decision", name) for name in facts["decision"]]
    for place in places:
        for wrong in WRONG:
            changed = json.loads(json.dumps(facts))
            holder = changed if len(place) == 1 else changed[place[0]]
            if wrong == "missing":
                del holder[place[-1]]
            else:
                holder[place[-1]] = wrong
            if changed != facts:
                found.append((f"{'.'.join(place)} = {wrong!r}", _with_facts(state, changed)))
    for name, tensor in state.items():
        found.append((f"{name} missing", {key: value for key, value in state.items() if key != name}))
        for other in (tensor.unsqueeze(0), tensor.to(torch.complex64), tensor.to(torch.int32), None, "x"):
            found.append((f"{name} as {type(other).__name__}", {**state, name: other}))
    return found


# Numbers that may be what they say.
_RIGHT = {"released = True", "all_active = True", "decision = None", "decision.budget = 1.5", "frozen = []"}
_RIGHT |= {"informed = True", "informed = 'missing'", "undecided_steps = 'missing'"}
_RIGHT.add(f"decision.budget = {10**30}")


def test_a_state_with_anything_missing_or_wrong_is_refused_and_changes_nothing() -> None:
    allocator, layers = _allocator(2)
    before, plans = allocator.state_dict(), masks(layers)
    tried = 0
    for what, state in _changed():
        if what in _RIGHT:
            continue
        tried += 1
        try:
            allocator.load_state_dict(state)
        except ValueError:
            assert_same_bits(allocator.state_dict(), before, what)
            assert masks(layers) == plans, what
            continue
        pytest.fail(f"{what}: taken over")
    assert tried > 150
    for _ in range(8):
        draw_gradients(layers)
        allocator.step()


def test_control_c_while_a_state_is_written_leaves_the_allocator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, layers = _allocator(2)
    state = _allocator(5)[0].state_dict()
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_E.fill_(1.0)
    before, plans, gates = allocator.state_dict(), masks(layers), [own.lora_E.clone() for own in layers.values()]
    restore, calls = type(allocator.masks).restore, [0]

    def interrupted(*arguments: Any) -> None:
        restore(*arguments)
        calls[0] += 1
        if calls[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(allocator.masks), "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        allocator.load_state_dict(state)
    assert_same_bits(allocator.state_dict(), before)
    assert masks(layers) == plans
    assert all(torch.equal(own.lora_E, gate) for own, gate in zip(layers.values(), gates, strict=True))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    for place in range(2):
        model[place] = AdaLoRALinear.from_linear(model[place], r=4)
    return model


_WRAPPED = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "a wrapper of the user's": Wrapper,
}


@pytest.mark.parametrize("second", _WRAPPED)
@pytest.mark.parametrize("first", _WRAPPED)
def test_a_state_goes_between_plain_and_wrapped_models(first: str, second: str) -> None:
    source_model, target_model = _model(), _model()
    source, target = (
        AdaLoraAllocator(_WRAPPED[wrap](model), total_step=10, target_r=2, tinit=1, tfinal=2)
        for wrap, model in ((first, source_model), (second, target_model))
    )
    for step in range(4):
        torch.manual_seed(step)
        for parameter in source_model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        source.step()
    source.freeze(next(iter(source.rank_pattern())))
    target.load_state_dict(source.state_dict())
    assert list(target.rank_pattern().values()) == list(source.rank_pattern().values())
    assert target.frozen == (next(iter(target.rank_pattern())),)


def test_names_of_a_compiled_model_are_the_models_own() -> None:
    allocator = AdaLoraAllocator(torch.compile(_model(), backend="eager"), total_step=10, target_r=2)
    assert list(allocator.rank_pattern()) == ["0", "1"]
