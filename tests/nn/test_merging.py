"""Merging an adapter into the frozen weight, and copies and casts of layers."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.layers import KINDS, factors_of, formula, set_states, small_layer
from torch import Tensor

from peftkernels import RankState
from peftkernels.nn import AdaLoRALinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, dtype: torch.dtype) -> None:
    layer = small_layer(kind)
    layer.base_layer.to(dtype)
    if isinstance(layer, AdaLoRALinear):
        set_states(layer, [2, 1, 0, 2])
        with torch.no_grad():
            layer.lora_E[2] = math.nan  # DEAD: must not leak
    original = layer.base_layer.weight.detach().clone()
    parameter, version = layer.base_layer.weight, layer.base_layer.weight._version
    x = torch.randn(5, 11, dtype=dtype)
    expected = formula(layer, x) if kind == "lora" else _formula_without_dead(layer, x)

    layer.merge()
    assert layer.merged
    assert "merged" in repr(layer)
    assert layer.base_layer.weight is parameter
    assert parameter._version > version
    assert torch.equal(layer(x), F.linear(x, parameter, layer.bias))
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    if dtype == torch.float64:  # the factors are float32, so is the delta
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(layer(x).double(), expected, **tolerance)
    exact = (original.double() + layer.delta_weight().double()).to(dtype)
    torch.testing.assert_close(parameter, exact, rtol=torch.finfo(dtype).eps, atol=0)
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()

    version = parameter._version
    layer.unmerge()
    assert not layer.merged
    assert "merged" not in repr(layer)
    assert parameter._version > version
    assert torch.equal(parameter, original)
    with pytest.warns(UserWarning, match="not merged"):
        layer.unmerge()
    assert torch.equal(parameter, original)


def _formula_without_dead(layer: AdaLoRALinear, x: Tensor) -> Tensor:
    alive = copy.deepcopy(layer)
    with torch.no_grad():
        alive.lora_E[alive.rank_state == RankState.DEAD] = 0
    return formula(alive, x)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_survives_copies_casts_and_checkpoints(kind: str) -> None:
    layer = small_layer(kind)
    original = layer.base_layer.weight.detach().clone()
    plain_state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied.base_layer.weight, original)
    assert layer.merged
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    cast.unmerge()
    assert torch.equal(cast.base_layer.weight, original.to(torch.bfloat16))
    # A merged layer's checkpoint is the same as an unmerged one's: the adapter is not applied twice on loading.
    assert layer.state_dict().keys() == plain_state.keys()
    assert all(torch.equal(value, plain_state[name]) for name, value in layer.state_dict().items())

    other = small_layer(kind, seed=1)
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind: str) -> None:
    layer = small_layer(kind, lora_dropout=0.25)
    if isinstance(layer, AdaLoRALinear):
        set_states(layer, [2, 0, 1, 2])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    layer.eval()
    x = torch.randn(3, 11)
    for duplicate in copies:
        duplicate.eval()
        assert torch.equal(duplicate(x), layer(x))
        assert repr(duplicate) == repr(layer)
        with torch.no_grad():
            factors_of(duplicate)[1].zero_()
        torch.testing.assert_close(duplicate(x), duplicate.base_layer(x))
        if isinstance(duplicate, AdaLoRALinear):
            assert isinstance(layer, AdaLoRALinear)
            set_states(duplicate, [0, 0, 0, 0])
            assert layer.rank_state.tolist() == [2, 0, 1, 2]
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_cast_leaves_the_plan() -> None:
    layer = small_layer("adalora")
    set_states(layer, [2, 0, 1, 2])
    layer.to(torch.bfloat16)
    assert layer.lora_E.dtype == torch.bfloat16
    assert (layer.rank_state.dtype, layer.rank_order.dtype, layer.rank_counts.dtype) == (
        torch.uint8,
        torch.int32,
        torch.int32,
    )
    assert layer.rank_order.tolist() == [0, 3, 2, 1]
    x = torch.randn(3, 11, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=0.02, atol=0.05)
