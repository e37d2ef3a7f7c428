"""QLoRA: HF peft's adapters on bitsandbytes' 4-bit weights, patched beside stock."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.peft_models import adapted, away_from_zero, config, gradients, llama, relative_errors, tokens
from torch import Tensor, nn

import peftkernels

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

each_kind = pytest.mark.parametrize("kind", ["lora", "lora-bias", "rslora", "adalora"])


def quantised(dtype: torch.dtype = torch.float32, nested: bool = True, bias: bool = False) -> Any:
    """A model whose linear layers but the last hold 4-bit weights and compute in ``dtype``."""
    torch.manual_seed(0)
    model: Any = llama(layers=1, width=64).to(dtype)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name != "lm_head":
                options = {"compress_statistics": nested, "quant_type": "nf4"}
                made = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=bias, compute_dtype=dtype, **options
                )
                made.weight = bitsandbytes.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, **options)
                if bias:
                    made.bias = nn.Parameter(torch.randn(linear.out_features, dtype=dtype) * 0.05, requires_grad=False)
                setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def pair(kind: str, *, strict: bool = True, base: Any = None, **changes: Any) -> tuple[Any, Any]:
    """A stock model and a patched copy, in training."""
    torch.manual_seed(1)
    stock = away_from_zero(peft.get_peft_model(quantised() if base is None else base, config(kind, **changes)))
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=strict)
    return stock.train(), patched.train()


@each_kind
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_those_of_stock_peft(kind: str, nested: bool) -> None:
    stock, patched = pair(kind, base=quantised(nested=nested, bias=nested))
    expected, found = gradients(stock, tokens()), gradients(patched, tokens())
    assert max(relative_errors(found, expected).values()) <= 1e-5
    counted = peftkernels.stats(patched)
    assert (counted.served, counted.fell_back) == (7, 0)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_training_goes_the_same_way(kind: str) -> None:
    losses: list[list[float]] = []
    for model in pair(kind):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for seed in range(5):
            loss = model(input_ids=tokens(seed), labels=tokens(seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_prepared_for_training(kind: str, reentrant: bool | None) -> None:
    """Norms in float32 before products in bfloat16, inputs that require grad, and checkpoints of activations."""
    found: list[dict[str, Tensor]] = []
    for patches in (False, True):
        base = peft.prepare_model_for_kbit_training(
            quantised(torch.bfloat16),
            use_gradient_checkpointing=reentrant is not None,
            gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
        )
        torch.manual_seed(1)
        model = away_from_zero(peft.get_peft_model(base, config(kind))).train()
        if patches:
            peftkernels.apply_to_peft(model)
        found.append(gradients(model, tokens()))
    # Stock peft takes the adapter's products in float32, these are in the base layer's bfloat16.
    assert max(relative_errors(found[1], found[0]).values()) < 0.05
    counted = peftkernels.stats(model)
    if reentrant:
        # The first pass records no gradients.
        assert (counted.served, counted.fell_back) == (7, 7)
    else:
        assert counted.fell_back == 0 and counted.served in (7, 14)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_no_dequantised_weight_is_kept(kind: str) -> None:
    _, patched = pair(kind)
    weights = {tuple(m.weight.quant_state.shape) for m in patched.modules() if hasattr(m, "quant_state")}
    assert len(weights) == 4
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = patched(input_ids=tokens(), labels=tokens()).loss
    assert len(saved) > 7
    frozen = {tuple(tensor.shape) for tensor in saved if not tensor.requires_grad and tensor.is_floating_point()}
    assert not weights & frozen
    loss.backward()


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_dropout_is_served(kind: str) -> None:
    _, patched = pair(kind, lora_dropout=0.3)
    found = [gradients(patched, tokens()) for _ in range(2)]
    counted = peftkernels.stats(patched)
    assert (counted.served, counted.fell_back) == (14, 0)
    assert all(value.isfinite().all() for value in found[0].values())
    name = next(name for name in found[0] if "lora_A" in name)
    assert not torch.equal(found[0][name], found[1][name]), "the two passes dropped the same"


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_inference_is_left_to_bitsandbytes(kind: str) -> None:
    stock, patched = pair(kind, strict=False)
    with torch.no_grad():
        expected, found = (model(input_ids=tokens()).logits for model in (stock, patched))
    assert torch.equal(found, expected)
    reason = "no gradients are recorded, and a quantised base is served in training"
    assert peftkernels.stats(patched).reasons == {reason: 7}


def test_dora_is_left_to_peft() -> None:
    stock, patched = pair("dora", strict=False)
    expected, found = gradients(stock, tokens()), gradients(patched, tokens())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert peftkernels.stats(patched).reasons == {"the variant DoraLinearVariant on a quantised base": 7}


def test_eight_bits_are_told() -> None:
    """bitsandbytes multiplies quantised activations there: another product than a dequantised weight's."""
    model = adapted("lora", target_modules=["q_proj"])
    layer: Any = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.__class__ = pytest.importorskip("peft.tuners.lora.bnb").Linear8bitLt
    report = peftkernels.apply_to_peft(model)
    assert [row.reason for row in report.rows] == ["Linear8bitLt layers are not served", ""]


def test_what_the_report_says() -> None:
    model = peft.get_peft_model(quantised(), config("lora"))
    report = peftkernels.apply_to_peft(model)
    assert report.served == 7 and "lora.Linear4bit" in str(report)
    peftkernels.revert(model)
    assert {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")} == {"peft.tuners.lora.bnb"}
    plain = peftkernels.apply_to_peft(peft.get_peft_model(quantised(), config("adalora")), adalora=False)
    assert {row.reason for row in plain.rows} == {"not asked for"}


def test_files_go_to_stock_peft(tmp_path: Path) -> None:
    _, patched = pair("lora")
    expected = gradients(patched, tokens())
    patched.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised(), tmp_path, is_trainable=True).train()
    found = gradients(loaded, tokens())
    assert max(relative_errors(found, expected).values()) <= 1e-5


def test_a_layer_that_is_not_quantised_yet() -> None:
    base = quantised()
    projection = base.model.layers[0].self_attn.q_proj
    projection.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False)
    model = peft.get_peft_model(base, config("lora"))
    reasons = {row.reason for row in peftkernels.apply_to_peft(model).rows}
    assert reasons == {"", "the base weight is not quantised yet"}
