"""Merging and unmerging under a patched model: peft writes the base weight behind torch's back."""

from __future__ import annotations

import peft
import pytest
import torch
from support.implementations import skip_unless_served
from torch import nn

import peftkernels

WIDTH = 1024


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe_merge"])
def test_a_merged_delta_of_one_element_shows_in_the_next_token(kind: str, safe: bool) -> None:
    """So narrow a change of so large a weight is not found by looking: the layer tells of it."""
    skip_unless_served("cpu")
    torch.manual_seed(0)
    if kind == "lora":
        config: peft.PeftConfig = peft.LoraConfig(r=4, target_modules=["0"])
    else:
        config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config).eval()
    layer = model.base_model.model[0]
    with torch.no_grad():
        # scaling · B·A is zero but in row 700, column 300.
        lora_A, lora_B = (
            factor.weight if isinstance(factor, nn.Linear) else factor
            for factor in (layer.lora_A["default"], layer.lora_B["default"])
        )
        for factor, place in ((lora_A, (0, 300)), (lora_B, (700, 0))):
            factor.zero_()[place] = 10.0
        if kind == "adalora":
            layer.lora_E["default"].fill_(1.0)
    peftkernels.apply_to_peft(model, strict=True)
    x = torch.zeros(1, WIDTH)
    x[0, 300] = 1.0
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            bare = model(x)
        assert (adapted - bare).abs().max() > 1, "the delta does not show: the test is empty"
        # The frozen weight is packed by a call of the kernels; merged, peft's own product reads it.
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(x), adapted)
        weight = layer.base_layer.weight
        nothing = torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1)
        frozen = peftkernels.lora_linear(x, weight, *nothing, bias=layer.base_layer.bias, impl="cpu")
        torch.testing.assert_close(frozen, nn.functional.linear(x, weight, layer.base_layer.bias))
        model.unmerge_adapter()
        frozen = peftkernels.lora_linear(x, weight, *nothing, bias=layer.base_layer.bias, impl="cpu")
        torch.testing.assert_close(frozen, nn.functional.linear(x, weight, layer.base_layer.bias))
