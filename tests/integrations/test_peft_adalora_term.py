"""The fused orthogonality term in HF peft's AdaLoRA model, and calls of its allocation that run peft's own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora import layer as peft_layer
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.adalora.model import AdaLoraModel
from support.adalora_pairs import (
    PHASES,
    Driver,
    Net,
    assert_same,
    draw,
    inputs,
    make,
    patched,
    record,
    trained,
    use_kernels,
)
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peftkernels.integrations.peft.allocator import (
    apply_to_adalora_model,
    revert_adalora_model,
)


@pytest.fixture(params=["auto", "eager"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that serve here, and those that serve everywhere."""
    use_kernels(monkeypatch, request.param)
    return request.param


def test_a_missing_gradient_is_named_before_anything_changes() -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, 5))
    fused.base_model(*inputs(5)).loss.backward()
    fused.base_model.model.blocks[1].key.lora_B["default"].grad = None
    with pytest.raises(TypeError, match=r"no gradient on blocks\.1\.key\.lora_B\.default: "):
        fused.base_model.update_and_allocate(5)
    fused.zero_grad()
    with pytest.raises(TypeError, match="and others"):
        fused.base_model.update_and_allocate(5)
    assert_same(stock, fused)


@pytest.mark.parametrize("budget", [72, 80, -1])
def test_budgets_that_peft_cannot_mask_to_raise_as_there(budget: int) -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, 3))
    errors = []
    for model in (stock, fused):
        with pytest.raises(RuntimeError) as caught:
            model.base_model.rankallocator.mask_to_budget(model.base_model.model, budget)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert record(fused).reasons == {f"a budget of {budget} masks {72 - budget} of 72 ranks": 1}


class OwnAllocator(RankAllocator):
    pass


def test_allocators_that_were_changed_run_pefts_code() -> None:
    stock = make(total_step=30)
    fused = patched(stock)
    calls = []
    for model in (stock, fused):
        allocator = model.base_model.rankallocator
        combine = allocator._combine_ipt
        allocator._combine_ipt = lambda *ipt, combine=combine: calls.append(1) or -combine(*ipt)
    Driver(stock, fused).run(range(1, 6))
    assert len(calls) == 2 * 5 * 12
    assert record(fused).reasons == {"_combine_ipt of the rank allocator was replaced": 10}
    fused.base_model.rankallocator = OwnAllocator(fused.base_model.model, fused.peft_config["default"], "default")
    fused.base_model(*inputs(6)).loss.backward()
    fused.base_model.update_and_allocate(6)
    assert any("OwnAllocator" in reason for reason in record(fused).reasons)


def test_factors_that_do_not_fit_run_pefts_code() -> None:
    stock = make(total_step=30)
    for block in stock.base_model.model.blocks:
        wide = block.out.lora_A["default"]
        block.out.lora_A["default"] = nn.Parameter(wide.detach().mT.contiguous().mT)
    fused = patched(stock)
    assert not fused.base_model.model.blocks[0].out.lora_A["default"].is_contiguous()
    Driver(stock, fused).run(range(1, 4))
    reason = "a factor is not contiguous, which changes the order of peft's sums"
    assert record(fused).reasons == {reason: 6}


def test_patterns_that_are_no_lists_of_bools_run_pefts_code() -> None:
    stock = make(total_step=30)
    fused = patched(stock)
    for keep in ([True, False] * 3, [1, 0, 0, 1, 1, 1], torch.tensor([True, False] * 3)):
        for model in (stock, fused):
            draw(model)
            names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
            pattern = dict.fromkeys(names, keep)
            model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
        gates = [parameter for name, parameter in fused.named_parameters() if "lora_E" in name]
        assert all((gate == 0).any() and (gate != 0).any() for gate in gates)
        for one, two in zip(stock.parameters(), fused.parameters(), strict=True):
            assert torch.equal(one, two)
    assert (record(fused).served, record(fused).fell_back) == (1, 2)
    with pytest.raises(KeyError):
        fused.base_model.rankallocator.mask_using_rank_pattern(
            fused.base_model.model, {"blocks.0.query.lora_E.default": [True] * 6}
        )


def _gradients(model: Any, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained(model).items():
        assert parameter.grad is not None
        yield name, parameter.grad / scale


@pytest.mark.parametrize("std", [0.05, 0.4])
@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_the_term_and_its_gradients_equal_pefts(std: float, scale: float, impl: str) -> None:
    stock = make(orth_reg_weight=0.7)
    draw(stock, std)
    fused = patched(stock)
    plain = copy.deepcopy(stock)
    plain.peft_config["default"].orth_reg_weight = 0.0
    terms = []
    for model in (stock, fused):
        term = 0.0
        for step in range(2):
            loss = model.base_model(*inputs(step)).loss
            term += float((loss - plain.base_model(*inputs(step)).loss).detach())
            (loss * scale).backward()
        terms.append(term)
    assert terms[0] == pytest.approx(terms[1], rel=1e-6) and terms[0] > 0.1
    theirs = dict(_gradients(fused, scale))
    for name, gradient in _gradients(stock, scale):
        assert (gradient - theirs[name]).norm() <= 1e-6 * gradient.norm(), name
    assert (record(fused).served, record(fused).fell_back) == (2, 0)


def test_the_term_in_lower_precision_and_under_autocast() -> None:
    fused = patched(make(orth_reg_weight=0.7))

    def term() -> float:
        return float(fused.base_model(*inputs(0)).loss.detach() - fused.base_model.model(*inputs(0)).loss.detach())

    exact = term()
    with torch.autocast("cpu", torch.bfloat16):
        assert term() == pytest.approx(exact, rel=1e-5)
    fused.bfloat16()
    loss = fused.base_model(*inputs(0, torch.bfloat16)).loss
    loss.backward()
    assert loss.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.bfloat16 for _, gradient in _gradients(fused))
    assert (record(fused).served, record(fused).fell_back) == (3, 0)


def test_losses_are_handled_as_in_peft() -> None:
    fused = patched(make(orth_reg_weight=0.5))
    inner = fused.base_model.model
    plain = inner(*inputs(0)).loss
    inner.give = lambda loss: SequenceClassifierOutput(loss=loss, logits=loss * 2)
    outputs = fused.base_model(*inputs(0))
    assert outputs.loss > plain + 0.1 and outputs["loss"] is outputs.loss
    assert torch.equal(outputs.logits, plain * 2)
    with torch.no_grad():
        assert torch.equal(fused.base_model(*inputs(0)).loss, outputs.loss)
    for give in (
        lambda loss: (loss, loss),
        lambda loss: {"loss": loss},
        lambda loss: SimpleNamespace(loss=None),
        lambda loss: SimpleNamespace(loss=float(loss.detach())),
    ):
        inner.give = give
        found, expected = fused.base_model(*inputs(0)), give(plain)
        assert repr(found) == repr(expected)
    inner.give = lambda loss: SimpleNamespace(loss=loss)
    fused.peft_config["default"].orth_reg_weight = 0
    assert torch.equal(fused.base_model(*inputs(0)).loss, plain)
    fused.peft_config["default"].orth_reg_weight = -0.1
    with pytest.raises(ValueError, match=r"orth_reg_weight: found -0\.1"):
        fused.base_model(*inputs(0))


def test_a_term_that_the_kernels_cannot_compute_is_pefts() -> None:
    stock = make()
    stock.base_model.model.blocks[0].register_parameter("lora_A_default", nn.Parameter(torch.randn(3, 4)))
    fused = patched(stock)
    calls = []
    fused.base_model.model.give = lambda loss: calls.append(1) or SimpleNamespace(loss=loss)
    assert torch.equal(stock.base_model(*inputs(0)).loss, fused.base_model(*inputs(0)).loss)
    assert calls == [1]
    assert record(fused).reasons == {"13 lora_A and 12 lora_B were found": 1}


def test_deepspeed_runs_pefts_code(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make(total_step=30)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, 3))
    served = record(fused).served
    monkeypatch.setattr(peft_layer, "deepspeed_config", dict)
    assert torch.equal(stock.base_model(*inputs(3)).loss, fused.base_model(*inputs(3)).loss)
    for model in (stock, fused):
        model.base_model.rankallocator.mask_to_budget(model.base_model.model, 50)
    assert_same(stock, fused)
    assert record(fused).served == served
    assert record(fused).reasons == {"DeepSpeed holds the factors": 1, "DeepSpeed holds the gradients": 1}


def test_a_model_that_is_not_trained_has_no_allocator(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(lambda loss: (loss,)), tmp_path)
    apply_to_adalora_model(loaded.base_model)
    assert isinstance(loaded.base_model(*inputs(0))[0], Tensor)
    revert_adalora_model(loaded.base_model)
    assert type(loaded.base_model) is AdaLoraModel


def test_a_compiled_model_gives_the_same_loss_and_gradients() -> None:
    base = Net(lambda loss: SequenceClassifierOutput(loss=loss))
    base.blocks = base.blocks[:1]
    stock = make(base, target_modules=["query", "down"])
    fused = patched(stock)
    compiled = torch.compile(fused.base_model, backend="eager")
    losses = []
    for model in (stock.base_model, compiled):
        losses.append(model(*inputs(0)).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    theirs = dict(_gradients(fused))
    for name, gradient in _gradients(stock):
        assert (gradient - theirs[name]).norm() <= 1e-6 * gradient.norm(), name
    assert (record(fused).served, record(fused).fell_back) == (1, 0)
