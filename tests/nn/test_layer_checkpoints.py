"""Checkpoints of the layers, in both directions with HF peft."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.layers import KINDS, set_states, small_layer
from torch import nn

from peftkernels.nn import AdaLoRALinear


def test_state_dict_keys() -> None:
    base = ["base_layer.weight", "base_layer.bias"]
    assert sorted(small_layer("lora").state_dict()) == sorted([*base, "lora_A.weight", "lora_B.weight"])
    adalora = sorted([*base, "lora_A", "lora_B", "lora_E", "rank_state"])
    assert sorted(small_layer("adalora").state_dict()) == adalora


@pytest.mark.parametrize("kind", KINDS)
def test_strict_round_trip_in_place(kind: str) -> None:
    source = nn.ModuleDict({"deep": nn.Sequential(small_layer(kind))})
    target = nn.ModuleDict({"deep": nn.Sequential(small_layer(kind, seed=1))})
    layer, other = source["deep"][0], target["deep"][0]
    if isinstance(layer, AdaLoRALinear):
        set_states(layer, [0, 2, 1, 2])
    tensors = {name: value.data_ptr() for name, value in [*other.named_buffers(), *other.named_parameters()]}
    assert not (missing := target.load_state_dict(source.state_dict())).missing_keys
    assert not missing.unexpected_keys
    x = torch.randn(3, 11)
    assert torch.equal(other(x), layer(x))
    assert tensors == {name: value.data_ptr() for name, value in [*other.named_buffers(), *other.named_parameters()]}
    if isinstance(other, AdaLoRALinear):
        assert other.rank_order.tolist() == [1, 3, 2, 0]
        assert other.rank_counts.tolist() == [2, 3]

    state = source.state_dict()
    del state["deep.0.base_layer.bias"]
    state["deep.0.surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"deep\.0\.base_layer\.bias") as raised:
        target.load_state_dict(state)
    assert "deep.0.surplus" in str(raised.value)


def test_missing_rank_state_means_active() -> None:
    layer = small_layer("adalora")
    set_states(layer, [0, 0, 1, 2])
    state = {name: value for name, value in small_layer("adalora", seed=1).state_dict().items() if name != "rank_state"}
    layer.load_state_dict(state)
    assert layer.rank_state.tolist() == [2, 2, 2, 2]
    assert layer.rank_counts.tolist() == [4, 4]
    # A partial checkpoint without factors leaves the states alone.
    set_states(layer, [0, 0, 1, 2])
    layer.load_state_dict({"base_layer.weight": state["base_layer.weight"]}, strict=False)
    assert layer.rank_state.tolist() == [0, 0, 1, 2]


def test_states_that_are_none_are_refused() -> None:
    layer = small_layer("adalora")
    state = layer.state_dict() | {"rank_state": torch.tensor([0, 1, 2, 3], dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match='"rank_state": found value 3, expected 0, 1 or 2'):
        layer.load_state_dict(state)
    assert layer.rank_state.tolist() == [2, 2, 2, 2]


def test_assigning_to_a_layer_on_meta() -> None:
    source = small_layer("adalora")
    set_states(source, [1, 2, 0, 2])
    with torch.device("meta"):
        target = AdaLoRALinear.from_linear(nn.Linear(11, 7), 4, 6)
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.rank_order.tolist() == [1, 3, 0, 2]
    assert target.rank_counts.tolist() == [2, 3]
    x = torch.randn(3, 11)
    assert torch.equal(target(x), source(x))


def _peft_model(kind: str, adapter: str = "default") -> Any:
    peft = pytest.importorskip("peft", reason="moving adapters to and from HF peft needs peft installed")
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 11))
    if kind == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"])
    else:
        config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["0", "1"])
    model = peft.get_peft_model(base, config, adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model


def _our_model(kind: str) -> nn.Sequential:
    return nn.Sequential(small_layer(kind, seed=3), small_layer(kind, n=11, k=7, seed=4))


@pytest.mark.parametrize("adapter", ["default", "french"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_pefts_memory(kind: str, adapter: str) -> None:
    """peft's in-memory state, base layer included, strictly, with its adapter name inside."""
    theirs = _peft_model(kind, adapter).eval()
    ours = _our_model(kind)
    ours.load_state_dict(theirs.base_model.model.state_dict())
    x = torch.randn(5, 11)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_through_pefts_checkpoint_names(kind: str) -> None:
    """peft's files name a tensor base_model.model.<path>.<name>; both directions with peft's own functions."""
    theirs = _peft_model(kind).eval()
    peft = pytest.importorskip("peft", reason="moving adapters to and from HF peft needs peft installed")
    ours = _our_model(kind)
    base = {key: value for key, value in theirs.base_model.model.state_dict().items() if "base_layer" in key}
    files = peft.get_peft_model_state_dict(theirs)
    ours.load_state_dict(base | {key.removeprefix("base_model.model."): value for key, value in files.items()})
    x = torch.randn(5, 11)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    changed = _our_model(kind)
    changed.load_state_dict(base, strict=False)
    state = {f"base_model.model.{key}": value for key, value in changed.state_dict().items() if "lora_" in key}
    assert state.keys() == files.keys()
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(theirs(x), changed(x), rtol=1e-5, atol=1e-5)


def test_several_adapters_are_refused() -> None:
    theirs = _peft_model("lora")
    peft = pytest.importorskip("peft", reason="moving adapters to and from HF peft needs peft installed")
    theirs.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]))
    with pytest.raises(
        RuntimeError, match=re.escape('"0.": found the adapters default, other, expected the names of one')
    ):
        _our_model("lora").load_state_dict(theirs.base_model.model.state_dict())


def test_resized_adapter_with_another_scaling_is_refused() -> None:
    """After resizing, peft keeps dividing by the rank at the start."""
    theirs = _peft_model("adalora")
    keep = {"0.lora_E.default": [True, False, True, True], "1.lora_E.default": [True, True, True, False]}
    theirs.base_model.resize_modules_by_rank_pattern(keep, "default")
    ours = nn.Sequential(small_layer("adalora", r=3), small_layer("adalora", n=11, k=7, r=3))
    with pytest.raises(RuntimeError, match=r'"0\.ranknum": found 4, expected 3: the adapter was trained with scaling'):
        ours.load_state_dict(theirs.base_model.model.state_dict())
