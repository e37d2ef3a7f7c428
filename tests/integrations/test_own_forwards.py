"""Forwards and hooks that lie on the instance, as accelerate and diffusers put them there, are called as by peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from support.peft_models import adapted, layer_in, loss_of, one_layer, tokens
from torch import Tensor, nn

import peftkernels
from peftkernels.integrations.peft import NotServedError

PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "the base layer": lambda layer: layer.base_layer,
    "a factor": lambda layer: layer.lora_A["default"],
    "another factor": lambda layer: layer.lora_B["default"],
    "the dropout": lambda layer: layer.lora_dropout["default"],
    "the magnitude": lambda layer: layer.lora_magnitude_vector["default"],
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


class Double(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


def by_accelerate(part: nn.Module) -> None:
    add_hook_to_module(part, Double())


def by_hand(part: nn.Module) -> None:
    forward = part.forward
    part.forward = lambda *given, **named: 2 * forward(*given, **named)  # type: ignore[method-assign]


def by_a_forward_hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda module, given, output: 2 * output)


def by_a_hook_with_keywords(part: nn.Module) -> None:
    part.register_forward_hook(lambda module, given, named, output: 2 * output, with_kwargs=True)


def by_a_hook_before(part: nn.Module) -> None:
    part.register_forward_pre_hook(lambda module, given: (2 * given[0], *given[1:]))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", [by_accelerate, by_hand, by_a_forward_hook, by_a_hook_with_keywords, by_a_hook_before])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_whose_forward_is_wrapped(part: str, wrap: Callable[[nn.Module], None], when: str, x: Tensor) -> None:
    stock = one_layer("dora", lora_dropout=0.5).eval()
    patched = copy.deepcopy(stock)
    before = stock(x)
    if when == "after":
        peftkernels.apply_to_peft(patched, strict=True)
        peftkernels.apply_to_peft(patched)
    for model in (stock, patched):
        wrap(PARTS[part](layer_in(model)))
    if when == "before":
        report = peftkernels.apply_to_peft(patched)
        assert report.served == (part != "the base layer")
    expected = stock(x)
    torch.testing.assert_close(patched(x), expected, rtol=1e-5, atol=1e-5)
    if part != "the dropout":
        assert not torch.allclose(expected, before, rtol=1e-2)
    counted = peftkernels.stats(patched)
    assert counted.served == 0 and counted.fell_back == (when == "after" or part != "the base layer")
    words = [*counted.reasons, *counted.unserved.values()]
    name = "a factor" if part == "another factor" else part
    assert words == [f"{name} has a forward of its own" if wrap in (by_accelerate, by_hand) else f"{name} has hooks"]


def test_a_class_whose_forward_is_exchanged(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = one_layer("lora")
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    torch.testing.assert_close(patched(x), stock(x))
    assert peftkernels.stats(patched).reasons == {"the base layer has a forward of its own": 1}


def test_a_layer_whose_forward_was_wrapped_is_not_said_to_be_served(x: Tensor) -> None:
    model = one_layer("lora")
    expected = model(x)
    layer = layer_in(model)
    forward = layer.forward
    layer.forward = lambda *given, **named: forward(*given, **named)
    report = peftkernels.apply_to_peft(model)
    assert [row.reason for row in report.rows] == ["the layer has a forward of its own"] and report.served == 0
    assert torch.equal(model(x), expected)
    counted = peftkernels.stats(model)
    assert (counted.served, counted.fell_back) == (0, 0)
    assert counted.unserved == {"base_model.model.layer": "the layer has a forward of its own"}
    assert "1 adapted modules run peft's own code, their calls are not counted" in str(counted)
    assert "  1 x the layer has a forward of its own" in str(counted)
    with pytest.raises(NotServedError, match="the layer has a forward of its own"):
        peftkernels.apply_to_peft(model, strict=True)


def test_a_layer_whose_forward_is_replaced_afterwards(x: Tensor) -> None:
    model = one_layer("lora")
    peftkernels.apply_to_peft(model)
    layer_in(model).forward = lambda x: x
    assert torch.equal(model(x), x)
    assert set(peftkernels.stats(model).unserved.values()) == {"the layer has a forward of its own"}


def hook_all(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            add_hook_to_module(module, ModelHook())


STEPS: dict[str, Callable[[Any], Any]] = {
    "apply": peftkernels.apply_to_peft,
    "revert": peftkernels.revert,
    "hook": hook_all,
    "unhook": remove_hook_from_submodules,
    "dispatch": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


@pytest.mark.parametrize(
    "steps",
    [
        "apply hook",
        "apply hook unhook",
        "apply hook apply unhook",
        "apply hook revert",
        "apply hook unhook revert",
        "apply hook revert apply",
        "apply dispatch unhook revert",
        "hook apply unhook revert",
        "hook unhook apply",
    ],
)
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_accelerates_hooks_in_any_order(kind: str, steps: str) -> None:
    """Every call works, a layer that is said to be served is, and revert leaves a model that works."""
    model = adapted(kind, **({"task_type": "CAUSAL_LM"} if kind == "adalora" else {}))
    expected = float(loss_of(model, tokens()))
    report = None
    for step in steps.split():
        found = STEPS[step](model)
        report = found if step == "apply" else None if step == "revert" else report
        if report is not None:
            peftkernels.stats(model, reset=True)
        assert float(loss_of(model, tokens())) == pytest.approx(expected, rel=1e-5)
        if report is not None:
            counted = peftkernels.stats(model)
            # `dispatch_model` hooks everything, the factors too.
            calls = (counted.fell_back, counted.served) if step == "dispatch" else (counted.served, counted.fell_back)
            assert calls == (report.served, 0)
            assert len(counted.unserved) == len(report.rows) - report.served
    if steps.startswith("apply") and not steps.endswith("revert"):
        assert report is not None and report.served == 14
