"""Adapters that come after `apply_to_peft`: served, counted and, under strict, refused as the first ones were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.peft_models import adapted, away_from_zero, config, llama, loss_of, tokens

import peftkernels
from peftkernels.integrations.peft import NotServedError, layers

SECOND = ["q_proj", "up_proj"]


def add(model: Any, **changes: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("second", config("lora", **{"target_modules": SECOND, **changes}))
    model.set_adapter("second")


def load(model: Any, folder: Path) -> None:
    adapted("lora", target_modules=SECOND).save_pretrained(folder)
    model.load_adapter(folder, "second")
    model.set_adapter("second")


def inject(model: Any) -> None:
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config("lora", target_modules=SECOND), model.base_model.model, "second")


@pytest.mark.parametrize("way", ["add", "add_dora", "load", "inject"])
def test_on_other_modules(way: str, tmp_path: Path) -> None:
    ways: dict[str, Callable[[Any], None]] = {
        "add": add,
        "add_dora": lambda model: add(model, use_dora=True),
        "load": lambda model: load(model, tmp_path),
        "inject": inject,
    }
    stock = adapted("lora", target_modules=["q_proj", "v_proj"])
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=True)
    losses = []
    for model in (stock, patched):
        ways[way](model)
        if way != "load":
            torch.manual_seed(6)
            away_from_zero(model)
        losses.append(float(loss_of(model, tokens())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    counted = peftkernels.stats(patched, reset=True)
    assert (counted.served, counted.fell_back, counted.unserved) == (4, 0, {})
    for model in (stock, patched):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter("default")
    assert float(loss_of(patched, tokens())) == pytest.approx(float(loss_of(stock, tokens())), rel=1e-5)
    assert peftkernels.stats(patched).served == 4
    peftkernels.revert(patched)
    assert not any(isinstance(module, layers.Served) or "_peftkernels" in vars(module) for module in patched.modules())


def test_transformers_own_adapters() -> None:
    model: Any = llama()
    peft.inject_adapter_in_model(config("lora", target_modules=["q_proj"]), model)
    peftkernels.apply_to_peft(model, strict=True)
    peft.inject_adapter_in_model(config("lora", target_modules=["up_proj"]), model, "second")
    model(input_ids=tokens())
    assert peftkernels.stats(model).served == 2


def test_a_copy_serves_what_is_added_to_it() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model, strict=True)
    copied = copy.deepcopy(model)
    add(copied)
    loss_of(copied, tokens())
    assert peftkernels.stats(copied).served == 4
    assert len(peftkernels.stats(model).modules) == 2, "the copy's layers are not the model's"
    read: Any = pickle.loads(pickle.dumps(model))
    add(read)
    loss_of(read, tokens())
    counted = peftkernels.stats(read)
    assert counted.served == 2, "what was read from a file does not know where the model is"
    assert set(counted.unserved.values()) == {"added after apply_to_peft, and not patched"}


def test_under_strict_what_cannot_be_served_is_refused() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model, strict=True)
    model.add_adapter("second", config("lora", target_modules=["q_proj", "embed_tokens"]))
    loss_of(model, tokens())
    for _ in range(2):
        with pytest.raises(NotServedError, match=r"(?s)second adapts.*embed_tokens.*Embedding layers are not served"):
            model.set_adapter("second")
    model.set_adapter("default")
    peftkernels.stats(model, reset=True)
    loss_of(model, tokens())
    assert peftkernels.stats(model).served == 2


def test_without_strict_it_is_told() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model)
    add(model, target_modules=["embed_tokens", "up_proj"])
    loss_of(model, tokens())
    counted = peftkernels.stats(model)
    assert counted.served == 2 and list(counted.unserved.values()) == ["Embedding layers are not served"]


def test_a_name_that_is_used_again_on_other_modules() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model, strict=True)
    add(model)
    model.delete_adapter("second")
    add(model, target_modules=["down_proj"])
    loss_of(model, tokens())
    counted = peftkernels.stats(model)
    assert counted.served == 2 and not counted.unserved


def test_the_settings_are_those_of_the_first() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model, impl="reference")
    add(model)
    assert {vars(m)["_peftkernels"].impl for m in model.modules() if "_peftkernels" in vars(m)} == {"reference"}


@pytest.mark.parametrize("rank", [3, 6])
@torch.no_grad()
def test_an_adalora_adapter_of_a_deleted_name(rank: int) -> None:
    """A server reuses one name: the scale is that of the adapter that is there now."""
    model = adapted("adalora", target_modules=["q_proj"], inference_mode=True)
    model.add_adapter("other", config("adalora", target_modules=["q_proj"], inference_mode=True))
    peftkernels.apply_to_peft(model, strict=True)
    for turn in range(12):
        loss_of(model, tokens())
        model.set_adapter("other")
        model.delete_adapter("default")
        changes = {"init_r": rank + turn % 3, "inference_mode": True, "target_modules": ["q_proj"]}
        model.add_adapter("default", config("adalora", **changes))
        away_from_zero(model)
        model.set_adapter("default")
        stock = copy.deepcopy(model)
        peftkernels.revert(stock)
        assert float(loss_of(model, tokens())) == pytest.approx(float(loss_of(stock, tokens())), rel=1e-6)


@torch.inference_mode()
def test_an_adalora_model_that_is_made_in_inference_mode() -> None:
    stock = adapted("adalora")
    patched = adapted("adalora")
    peftkernels.apply_to_peft(patched, strict=True)
    assert float(loss_of(patched, tokens())) == pytest.approx(float(loss_of(stock, tokens())), rel=1e-6)


def test_stats_after_nothing_was_served() -> None:
    model = adapted("lora", target_modules=["q_proj"])
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.base_layer.weight.requires_grad_(True)
    assert peftkernels.apply_to_peft(model).served == 0
    loss_of(model, tokens())
    counted = peftkernels.stats(model)
    assert (counted.served, counted.fell_back) == (0, 0)
    assert set(counted.unserved.values()) == {"the base weight is trained"} and len(counted.unserved) == 2
    assert str(counted).splitlines() == [
        "0 of 0 adapter calls served",
        "2 adapted modules run peft's own code, their calls are not counted",
        "  2 x the base weight is trained",
    ]
