"""QLoRA on CPUs whose evaluation bitsandbytes repacks weights for: gradients after it are those before it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from support.peft_models import away_from_zero, config, gradients, tokens
from test_quantised import quantised
from torch import Tensor

import peftkernels
from peftkernels.integrations.peft.cpu_packing import _packed, keep_from_packing

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional: Any = bitsandbytes.functional
if not hasattr(functional, "_convert_weight_packed_for_cpu"):
    pytest.skip("this release of bitsandbytes packs no weights", allow_module_level=True)

each_kind = pytest.mark.parametrize("kind", ["lora", "adalora"])
each_nested = pytest.mark.parametrize("nested", [False, True], ids=["float_scales", "nested_scales"])


def model_of(kind: str, nested: bool, **changes: Any) -> Any:
    torch.manual_seed(1)
    return away_from_zero(peft.get_peft_model(quantised(nested=nested), config(kind, **changes))).train()


def bases(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module) is bitsandbytes.nn.Linear4bit]


def pack(base: Any) -> None:
    """As the layer's first call in eval mode does on a processor with AVX-512 BF16."""
    base.weight.data, _ = functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)


@torch.no_grad()
def evaluate(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=tokens()).logits
    model.train()
    return found


@each_kind
@each_nested
def test_training_goes_on_to_the_bit_after_an_evaluation(kind: str, nested: bool) -> None:
    model = model_of(kind, nested)
    for base in bases(model):
        # On a processor that does not pack this changes nothing.
        base.support_avx512bf16_for_cpu = True
    peftkernels.apply_to_peft(model, strict=True)
    before = gradients(model, tokens())
    peftkernels.apply_to_peft(model)
    first = evaluate(model)
    after = gradients(model, tokens())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(evaluate(model), first)
    assert not any(map(_packed, bases(model)))
    peftkernels.revert(model)
    assert all(base.support_avx512bf16_for_cpu for base in bases(model))


@each_kind
@each_nested
def test_a_weight_that_was_packed_before(kind: str, nested: bool) -> None:
    """Its scales were rounded to bfloat16 and stay so: gradients are those of these scales, none is missing."""
    stock = model_of(kind, nested)
    exact = gradients(stock, tokens())
    packed = copy.deepcopy(stock)
    for base in bases(packed):
        pack(base)
    late = copy.deepcopy(packed)
    peftkernels.apply_to_peft(packed, strict=True)
    found = gradients(packed, tokens())
    assert found.keys() == exact.keys()
    for name, own in exact.items():
        assert float((found[name] - own).norm() / own.norm()) < 0.05, name
    assert peftkernels.stats(packed).served == 7
    # Calls that peft's own code makes have gradients too.
    peftkernels.apply_to_peft(late)
    for module in late.modules():
        if hasattr(module, "lora_A"):
            module.lora_dropout["default"].register_forward_hook(lambda *given: None)
    again = gradients(late, tokens())
    assert peftkernels.stats(late).fell_back == 7
    for name, own in found.items():
        torch.testing.assert_close(again[name], own, rtol=1e-4, atol=1e-7)


@each_nested
def test_what_unpacking_gives(nested: bool) -> None:
    """The codes that were packed, and the scales that packing rounded."""
    base = bases(model_of("lora", nested))[0]
    state = base.weight.quant_state
    expected = functional.dequantize_4bit(base.weight.data, state).clone()
    codes = base.weight.data.clone()
    pack(base)
    assert _packed(base)
    keep_from_packing(base)
    assert not _packed(base) and torch.equal(base.weight.data, codes) and base.weight.data.shape == codes.shape
    found = functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    assert found.dtype == expected.dtype
    # bfloat16 keeps eight bits.
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


def test_a_weight_that_somebody_packs_all_the_same() -> None:
    model = model_of("lora", True)
    peftkernels.apply_to_peft(model, strict=True)
    before = gradients(model, tokens())
    for base in bases(model):
        pack(base)
    after = gradients(model, tokens())
    assert after.keys() == before.keys()
    assert all(float((after[name] - own).norm() / own.norm()) < 0.05 for name, own in before.items())
