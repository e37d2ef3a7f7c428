"""HF peft's models on our kernels: what they compute, what is served, what is told, and the way back."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from support.peft_models import TARGETS, adapted, gradients, loss_of, pair, relative_errors, tokens
from torch import nn

import peftkernels
from peftkernels.integrations.peft import NotServedError, layers, versions

KINDS = ("lora", "rslora", "dora", "adalora")
LAYERS = {"llama": 14, "bert": 12, "gpt2": 8}


def layer_of(model: Any) -> Any:
    """The first adapted layer."""
    return next(m for m in model.modules() if isinstance(m, (layers.Linear, layers.SVDLinear)))


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("kind", [*KINDS, "lora-bias", "base-bias"])
def test_gradients_are_those_of_stock_peft(kind: str, model: str) -> None:
    stock, patched = pair(kind, model)
    ids = tokens()
    found, expected = gradients(patched, ids), gradients(stock, ids)
    # The same number added to all keys changes no attention: the bias of a key has no gradient but rounding.
    for name in [name for name in expected if "key" in name and name.endswith("bias")]:
        assert float(found.pop(name).abs().max()) < 1e-8 > float(expected.pop(name).abs().max())
    errors = relative_errors(found, expected)
    assert errors and max(errors.values()) <= 1e-5, max(errors.items(), key=lambda each: each[1])
    assert loss_of(patched, ids).item() == pytest.approx(loss_of(stock, ids).item(), rel=1e-6)
    counted = peftkernels.stats(patched)
    assert (counted.served, counted.fell_back) == (2 * LAYERS[model], 0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_follow_stock_peft(kind: str, fused: bool) -> None:
    curves = []
    for model in pair(kind):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=fused)
        losses = []
        for step in range(50):
            loss = loss_of(model, tokens(step % 5))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.05
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32_factors", "bf16_factors"])
def test_bf16_is_as_near_to_float32_as_stock_peft(kind: str, adapter_dtype: torch.dtype) -> None:
    """One layer, against float64: twice peft's own error, the other rounding being the output's."""
    stock = adapted(kind, dtype=torch.bfloat16)
    theirs = layer_of(stock).to(adapter_dtype)
    theirs.base_layer.to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    holder = nn.ModuleList([ours])
    peftkernels.apply_to_peft(holder, strict=True)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(64, theirs.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    reference = exact(x.double())
    outputs = [layer(x) for layer in (theirs, ours)]
    assert all(y.dtype is torch.bfloat16 for y in outputs)
    theirs_error, ours_error = (float((y.double() - reference).norm()) for y in outputs)
    assert 0 < ours_error <= 2 * theirs_error
    assert peftkernels.stats(holder).served == 1


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_served(kind: str) -> None:
    stock, patched = pair(kind, "bert")
    found = []
    for model in (stock, patched):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert max(relative_errors(found[1], found[0]).values()) < 0.1
    assert peftkernels.stats(patched).fell_back == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_served(kind: str) -> None:
    """Everything dropped is the base layer alone; with nothing dropped the adapter is whole; between, the mean is."""
    stock, patched = pair(kind, "bert", lora_dropout=0.5)
    layer, twin = layer_of(patched), layer_of(stock)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
    whole = twin.eval()(x)
    layer.train()
    with torch.no_grad():
        torch.manual_seed(3)
        mean = sum(layer(x) for _ in range(4000)) / 4000
        adapter = whole - layer.base_layer(x)
        assert float((mean - whole).norm()) < 0.1 * float(adapter.norm())
        assert not torch.equal(layer(x), layer(x))
        layer.lora_dropout["default"].p = 1.0
        twin.train().lora_dropout["default"].p = 1.0
        torch.testing.assert_close(layer(x), twin(x))
    assert peftkernels.stats(patched).fell_back == 0


def test_doras_dropout_is_pefts_own() -> None:
    """With the same random numbers it is the same to rounding, gradients included."""
    stock, patched = pair("dora", "bert", lora_dropout=0.3)
    found = []
    for model in (stock, patched):
        torch.manual_seed(5)
        found.append(gradients(model.train(), tokens()))
    assert max(relative_errors(found[1], found[0]).values()) <= 1e-5


def test_the_report_is_a_table() -> None:
    model = adapted("lora", target_modules=["q_proj", "embed_tokens"])
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    report = peftkernels.apply_to_peft(model)
    assert report.served == 1 and len(report.rows) == 3
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "layer", "served", "reason"] and set(lines[1]) == {"-", " "}
    assert "lora.Embedding" in lines[2] and lines[2].endswith("no      Embedding layers are not served")
    assert lines[3].endswith("layers.0.self_attn.q_proj  lora.Linear     yes")
    assert lines[4].endswith("no      the base weight is trained")
    assert lines[5] == "1 of 3 adapted modules are served by peftkernels"


@pytest.mark.parametrize(("asked", "served"), [({"adalora": False}, 0), ({"lora": False}, 12), ({}, 12)])
def test_a_kind_that_is_not_asked_for_stays(asked: dict[str, bool], served: int) -> None:
    model = adapted("adalora", "bert")
    report = peftkernels.apply_to_peft(model, **asked)
    assert report.served == served
    assert {row.reason for row in report.rows} == ({""} if served else {"not asked for"})


def test_a_second_call_replaces_the_first() -> None:
    """A layer that it does not serve is peft's again, whatever the first call did."""
    model = adapted("lora", "bert")
    peftkernels.apply_to_peft(model, impl="reference")
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_(True)
    assert peftkernels.apply_to_peft(model).served == 11 and type(layer) is layers.Linear
    assert all(m.__dict__["_peftkernels"].impl == "auto" for m in model.modules() if "_peftkernels" in m.__dict__)
    assert peftkernels.apply_to_peft(model, lora=False).served == 0
    assert all(not isinstance(m, layers.Served) for m in model.modules())


def _two_active(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS["bert"]))
    model.base_model.set_adapter(["default", "second"])


def _hooked(model: Any) -> None:
    layer_of(model).base_layer.register_forward_hook(lambda *given: None)


def _hooked_factor(model: Any) -> None:
    layer_of(model).lora_A["default"].register_forward_hook(lambda *given: None)


def _trained_base(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "reason", "calls"),
    [
        (_two_active, "2 adapters are active at once", 12),
        (_hooked, "the base layer has hooks", 1),
        (_hooked_factor, "a factor has hooks", 1),
        (_trained_base, "the base weight is trained", 1),
    ],
)
def test_what_cannot_be_served_runs_pefts_code_and_is_told(change: Any, reason: str, calls: int) -> None:
    stock, patched = adapted("lora", "bert"), adapted("lora", "bert")
    peftkernels.apply_to_peft(patched)
    for model in (stock, patched):
        torch.manual_seed(1)
        change(model)
    ids = tokens()
    torch.testing.assert_close(loss_of(patched, ids), loss_of(stock, ids))
    counted = peftkernels.stats(patched, reset=True)
    assert (counted.served, counted.fell_back, counted.reasons) == (12 - calls, calls, {reason: calls})
    assert sum(fell_back for _, fell_back in counted.modules.values()) == calls
    assert f"{calls} x {reason}" in str(counted)
    assert peftkernels.stats(patched).fell_back == 0


def test_strict_raises_in_place_of_falling_back() -> None:
    model = adapted("lora", "bert")
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(NotServedError, match=r"nothing was changed\n(.*\n)*.*the base weight is trained"):
        peftkernels.apply_to_peft(model, strict=True)
    assert type(layer) is layers.Linear
    layer.base_layer.weight.requires_grad_(False)
    peftkernels.apply_to_peft(model, strict=True)
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(NotServedError, match="strict=True, and peftkernels cannot serve the call: the base weight is"):
        loss_of(model, tokens())


def test_a_named_implementation_is_used() -> None:
    model = adapted("lora", "bert")
    peftkernels.apply_to_peft(model, impl="cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        loss_of(model, tokens())
    peftkernels.apply_to_peft(model, impl="reference")
    assert loss_of(model, tokens()).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_revert_gives_back_what_was(kind: str) -> None:
    model = adapted(kind)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    text, weights = repr(model), {name: p.clone() for name, p in model.state_dict().items()}
    peftkernels.apply_to_peft(model)
    assert repr(model) == text and model.state_dict().keys() == weights.keys()
    assert isinstance(layer_of(model), layers.Linear if kind != "adalora" else layers.SVDLinear)
    assert type(layer_of(model)) in (layers.PeftKernelsLinear, layers.PeftKernelsSVDLinear)
    loss_of(model, tokens()).backward()
    peftkernels.revert(model)
    peftkernels.revert(model)
    assert {name: (type(module), vars(module).keys()) for name, module in model.named_modules()} == {
        name: (kind, own.keys()) for name, (kind, own) in before.items()
    }
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    with pytest.raises(ValueError, match="model: found no module that apply_to_peft was called with, expected one"):
        peftkernels.stats(model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: peftkernels.apply_to_peft(3), TypeError, "model: found int, expected a torch.nn.Module"),
        (lambda: peftkernels.apply_to_peft(nn.Linear(2, 2)), ValueError, "model: found no adapter layer of HF peft"),
        (lambda: peftkernels.apply_to_peft(adapted("lora"), impl="fast"), ValueError, "impl: found 'fast', expected"),
        (lambda: peftkernels.revert(None), TypeError, "model: found NoneType"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_another_release_of_peft_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "KNOWN", ((0, 1),))
    versions._checked.cache_clear()
    model = adapted("lora")
    with pytest.warns(UserWarning, match=r"is not one of the releases .* \(0\.1\); a self-check of its layers passed"):
        peftkernels.apply_to_peft(model)
    assert peftkernels.stats(model).served == 0

    versions._checked.cache_clear()
    peftkernels.revert(model)
    original = layers.PeftKernelsLinear._serve
    monkeypatch.setattr(layers.PeftKernelsLinear, "_serve", lambda self, x, *given: original(self, 1.01 * x, *given))
    with pytest.raises(
        RuntimeError, match=r"expected 0\.1: its layers compute another y of LoRA, gradient of x of LoRA"
    ):
        peftkernels.apply_to_peft(model)
    assert type(layer_of(model)) is layers.Linear
    versions._checked.cache_clear()


def test_the_self_check_passes_on_the_installed_release() -> None:
    assert versions.minor_release(peft.__version__) in versions.KNOWN
    assert versions.self_check() == []


def test_importing_the_package_imports_no_peft() -> None:
    code = (
        "import sys, peftkernels\n"
        "assert 'peft' not in sys.modules and 'peftkernels.integrations' not in sys.modules\n"
        "import peftkernels.integrations.peft\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.modules['peft'] = None\n"
        "import torch\n"
        "try: peftkernels.apply_to_peft(torch.nn.Linear(2, 2))\n"
        "except ImportError as error: assert \"pip install 'peftkernels[hf]'\" in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_adaloras_allocation_is_served_too() -> None:
    """Thirty steps under a falling budget: the same masks as stock peft, and all of it on our kernels."""
    schedule = {"tinit": 3, "tfinal": 8, "total_step": 30, "task_type": "CAUSAL_LM"}
    patterns, losses = [], []
    stock, patched = pair("adalora", **schedule)
    for model in (stock, patched):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        patterns.append([])
        for step in range(1, 31):
            loss = loss_of(model, tokens(step % 5))
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            patterns[-1].append(model.peft_config["default"].rank_pattern)
        losses.append(loss.item())
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[1][-1].values())) == 2 * 14
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    counted = peftkernels.stats(patched, reset=True)
    # A term in every step, 21 updates, 18 masks while the budget falls and one at its end, and 8 repeated ones.
    assert counted.allocation == (30 + 21 + 18 + 1 + 8, 0, {})
    assert "78 of 78 calls of AdaLoRA's allocation served (100 %)" in str(counted)
    again = peftkernels.stats(patched).allocation
    assert again == (0, 0, {})


def test_training_adalora_without_allocation_is_noticed() -> None:
    model = adapted("adalora", task_type="CAUSAL_LM", target_modules=["q_proj"])
    peftkernels.apply_to_peft(model)
    peftkernels.apply_to_peft(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train() -> None:
        for _ in range(21):
            loss_of(model, tokens()).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="trained for 20 steps without a call of update_and_allocate"):
        train()
