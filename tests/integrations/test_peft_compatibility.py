"""What people do with HF peft's models goes on working with patched ones: each beside the stock model."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.agreement import skip_unless_they_agree, transformers_takes_this_peft
from support.peft_models import (
    TARGETS,
    adapted,
    away_from_zero,
    bert,
    config,
    gradients,
    llama,
    pair,
    relative_errors,
    tokens,
)
from torch import Tensor

import peftkernels
from peftkernels.integrations.peft import layers
from peftkernels.integrations.peft.classes import CLASSES

KINDS = ("lora", "dora", "adalora")
each_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: Any, seed: int = 0) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens(seed)).logits
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def saved_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration; peft writes the set of target modules in no particular order."""
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    found["target_modules"].sort()
    return found


@each_kind
def test_merge_and_unmerge(kind: str) -> None:
    stock, patched = pair(kind)
    before = logits(patched)
    peftkernels.stats(patched, reset=True)
    for model in (stock, patched):
        model.merge_adapter()
    close(logits(patched), logits(stock))
    counted = peftkernels.stats(patched)
    assert counted.served == counted.fell_back == 0, "the merged weight alone is multiplied"
    patched.unmerge_adapter()
    close(logits(patched), before)
    assert peftkernels.stats(patched).served == 14


@each_kind
def test_merge_and_unload(kind: str) -> None:
    stock, patched = pair(kind)
    expected = logits(stock)
    whole = patched.merge_and_unload()
    assert not any(isinstance(m, (layers.Linear, layers.SVDLinear)) for m in whole.modules())
    close(logits(whole), expected)


@each_kind
def test_disable_adapter(kind: str) -> None:
    stock, patched = pair(kind)
    with patched.disable_adapter(), stock.disable_adapter():
        assert torch.equal(logits(patched), logits(stock))
    close(logits(patched), logits(stock))
    assert not torch.equal(logits(patched), logits(patched.get_base_model()) * 0)
    counted = peftkernels.stats(patched)
    assert counted.fell_back == 0 and counted.served % 14 == 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_add_set_and_delete_adapters(kind: str) -> None:
    stock, patched = pair(kind)
    before = logits(patched)
    for model in (stock, patched):
        torch.manual_seed(1)
        model.add_adapter("second", config(kind, r=2, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("second")
        away_from_zero(model)
    close(logits(patched), logits(stock))
    for model in (stock, patched):
        model.set_adapter("default")
    first = logits(patched)
    close(first, logits(stock))
    assert not torch.equal(first, before), "all factors were drawn anew"
    for model in (stock, patched):
        model.delete_adapter("second")
    assert torch.equal(logits(patched), first) and list(patched.peft_config) == ["default"]
    assert peftkernels.stats(patched).fell_back == 0


def test_mixed_batches_fall_back() -> None:
    stock, patched = adapted("lora"), adapted("lora")
    peftkernels.apply_to_peft(patched)
    found = []
    for model in (stock, patched):
        torch.manual_seed(1)
        model.add_adapter("second", config("lora", init_lora_weights=False))
        model.eval()
        with torch.no_grad():
            found.append(model(input_ids=tokens(), adapter_names=["default", "second"]).logits)
    close(found[1], found[0])
    counted = peftkernels.stats(patched)
    assert counted.served == 0 and counted.reasons == {"the call has the arguments adapter_names": 14}


@each_kind
def test_saved_patched_and_loaded_stock_and_the_reverse(kind: str, tmp_path: Path) -> None:
    """Equal files (but for the order in which peft writes a set), and equal outputs in the other kind of model."""
    stock, patched = pair(kind)
    stock.save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "patched")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "stock" / weights).read_bytes() == (tmp_path / "patched" / weights).read_bytes()
    assert saved_config(tmp_path / "stock") == saved_config(tmp_path / "patched")
    expected = logits(stock)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "patched")
    assert type(next(m for m in loaded.modules() if hasattr(m, "lora_A"))) in CLASSES
    close(logits(loaded), expected)
    peftkernels.apply_to_peft(loaded, strict=True)
    close(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "stock", "again")
    loaded.set_adapter("again")
    close(logits(loaded), expected)


@each_kind
def test_state_dicts_go_both_ways(kind: str) -> None:
    stock, patched = pair(kind)
    expected = logits(stock)
    with torch.no_grad():
        for model in (stock, patched):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.5)
    other = adapted(kind)
    patched.load_state_dict(other.state_dict())
    close(logits(patched), expected)
    stock.load_state_dict(patched.state_dict())
    close(logits(stock), expected)


@each_kind
def test_copies_and_pickles_are_served(kind: str) -> None:
    _, patched = pair(kind)
    expected = logits(patched)
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    for again in (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(file, weights_only=False),
    ):
        peftkernels.stats(again, reset=True)
        assert torch.equal(logits(again), expected)
        assert peftkernels.stats(again).served == 14
        peftkernels.revert(again)
        close(logits(again), expected)
    counted = peftkernels.stats(patched).served
    logits(patched)
    assert peftkernels.stats(patched).served == counted + 14, "a copy counts for itself"


@each_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    stock, patched = pair(kind)
    expected = gradients(stock, tokens())
    for model in (stock, patched):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    peftkernels.stats(patched, reset=True)
    found = gradients(patched, tokens())
    assert peftkernels.stats(patched).served == 28, "each layer ran twice"
    assert max(relative_errors(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_gradient_checkpointing_repeats_the_dropout(kind: str) -> None:
    """The pass that is repeated for the gradients drops what the first one dropped."""
    found = []
    for checkpointing in (False, True):
        _, patched = pair(kind, lora_dropout=0.4)
        patched.enable_input_require_grads()
        if checkpointing:
            patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        patched.train()
        torch.manual_seed(4)
        found.append(gradients(patched, tokens()))
    assert max(relative_errors(found[1], found[0]).values()) <= 1e-6


@each_kind
def test_compiled(kind: str) -> None:
    """One graph without breaks, and peft's gradients."""
    stock, patched = pair(kind, "bert")
    expected = gradients(stock, tokens())
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    hidden = compiled(input_ids=tokens()).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().mean().backward()
    found = {name: p.grad for name, p in patched.named_parameters() if p.grad is not None}
    assert max(relative_errors(found, expected).values()) <= 1e-4
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3):
        compiled(input_ids=tokens(seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles
    assert peftkernels.stats(patched).fell_back == 0


@each_kind
def test_prepared_for_training_on_few_bits(kind: str) -> None:
    """Of a base that is not quantised it freezes and casts; peft does the same to stock and patched models."""
    found = []
    for served in (False, True):
        torch.manual_seed(0)
        base = peft.prepare_model_for_kbit_training(llama().bfloat16(), use_gradient_checkpointing=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config(kind, init_lora_weights=True))
        away_from_zero(model)
        if served:
            assert peftkernels.apply_to_peft(model, strict=True).served == 14
        found.append(gradients(model, tokens()))
    assert max(relative_errors(found[1], found[0]).values()) < 0.1


def test_quantised_bases_are_told() -> None:
    """Their layers have classes of their own, which are named; with bitsandbytes they are built, without it made up."""
    model = adapted("lora", target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    class Linear4bit(type(layer.base_layer)):  # type: ignore[misc]
        """Stands for the class of a quantised layer."""

    layer.base_layer.__class__ = Linear4bit
    report = peftkernels.apply_to_peft(model)
    assert [row.reason for row in report.rows] == ["the base layer is a Linear4bit", ""]
    logits(model)
    counted = peftkernels.stats(model)
    assert (counted.served, counted.fell_back) == (1, 0)


@each_kind
def test_generation_with_a_cache(kind: str) -> None:
    stock, patched = pair(kind)
    found = [
        model.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
        for model in (stock.eval(), patched.eval())
    ]
    assert torch.equal(found[1], found[0]) and found[0].shape == (2, 20)
    counted = peftkernels.stats(patched)
    assert (counted.served, counted.fell_back) == (8 * 14, 0)


@each_kind
def test_inference_keeps_nothing(kind: str) -> None:
    stock, patched = pair(kind)
    with torch.inference_mode():
        expected, found = (model(input_ids=tokens()).logits for model in (stock, patched))
    close(found, expected)
    with torch.no_grad():
        assert patched(input_ids=tokens()).logits.grad_fn is None


def test_adapters_of_transformers_own() -> None:
    """`model.add_adapter` puts peft's layers into a model without a PeftModel around it."""
    skip_unless_they_agree(transformers_takes_this_peft)
    model = bert()
    torch.manual_seed(0)
    model.add_adapter(config("lora", "bert", init_lora_weights=False))
    with torch.no_grad():
        expected = model(input_ids=tokens()).last_hidden_state
        report = peftkernels.apply_to_peft(model, strict=True)
        torch.testing.assert_close(model(input_ids=tokens()).last_hidden_state, expected)
    assert report.served == 12 and peftkernels.stats(model).served == 12


def test_the_base_layers_dtype_may_change() -> None:
    stock, patched = pair("lora")
    for model in (stock, patched):
        model.double()
    torch.testing.assert_close(logits(patched), logits(stock))
    assert logits(patched).dtype is torch.float64


def test_low_rank_weights_may_be_replaced() -> None:
    """peft's own initialisations and `set_peft_model_state_dict` write or replace factors at any time."""
    stock, patched = pair("lora")
    halves = {name: p * 0.5 for name, p in peft.get_peft_model_state_dict(stock).items()}
    for model in (stock, patched):
        peft.set_peft_model_state_dict(model, halves)
    close(logits(patched), logits(stock))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (stock, patched):
            for module in model.modules():
                if isinstance(module, layers.Linear):
                    up = module.lora_B["default"]
                    up.weight = torch.nn.Parameter(torch.ones_like(up.weight) * 0.01)
    close(logits(patched), logits(stock))
    assert TARGETS["llama"] and peftkernels.stats(patched).fell_back == 0
