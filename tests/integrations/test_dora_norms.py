"""DoRA's norms are those of the weights as they are in a call, however they were written; kept only inside `frozen`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from support.peft_models import layer_in, one_layer
from torch import Tensor, nn
from torch.func import functional_call

import peftkernels
from peftkernels.integrations.peft import dora, frozen, norms
from peftkernels.integrations.peft.norms import row_norms
from peftkernels.ops.call import Adapter

Change = Callable[[Any], None]


def both(**changes: Any) -> tuple[Any, Any]:
    """A stock model in eval mode, and a patched copy."""
    stock = one_layer("dora", **changes).eval()
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=True)
    return stock, patched


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one where norms are made."""
    found: list[None] = []

    def counted(*arguments: Any) -> Tensor:
        found.append(None)
        return row_norms(*arguments)

    monkeypatch.setattr(norms, "row_norms", counted)
    monkeypatch.setattr(dora, "row_norms", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_need_no_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 40, generator=generator).to(dtype)
    lora_A, lora_B = torch.randn(3, 40, generator=generator), torch.randn(1500, 3, generator=generator)
    exact = (weight.double() + 0.7 * lora_B.double() @ lora_A.double()).norm(dim=1)
    for scaling in (0.7, torch.tensor(0.7)):
        with torch.autocast("cpu", torch.bfloat16):
            found = row_norms(weight, Adapter(lora_A, lora_B, scaling=scaling))
        assert found.dtype is torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def factors_through_data(layer: Any) -> None:
    """As peft's hotswap, diffusers' EMAModel and MeZO write them."""
    layer.lora_B["default"].weight.data.mul_(2)


def factors_by_vector(layer: Any) -> None:
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    flat = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(flat * 1.5, parameters)


def factors_in_other_memory(layer: Any) -> None:
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data * 2


def factors_in_place(layer: Any) -> None:
    layer.lora_B["default"].weight.mul_(2)


def factors_by_a_fused_optimizer(layer: Any) -> None:
    weight = layer.lora_B["default"].weight
    with torch.enable_grad():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def scaling_through_its_number(layer: Any) -> None:
    layer.scaling["default"] *= 2


def base_through_data(layer: Any) -> None:
    layer.base_layer.weight.data.mul_(2)
    peftkernels.weights_changed(layer)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "change",
    [
        factors_through_data,
        factors_by_vector,
        factors_in_other_memory,
        factors_in_place,
        factors_by_a_fused_optimizer,
        scaling_through_its_number,
        base_through_data,
    ],
)
def test_weights_that_are_written_between_two_calls(change: Change, mode: Any, x: Tensor) -> None:
    stock, patched = both()
    with mode():
        patched(x)
    with torch.no_grad():
        for model in (stock, patched):
            change(layer_in(model))
    with mode():
        torch.testing.assert_close(patched(x), stock(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_scaling_tensor_that_is_written(x: Tensor) -> None:
    """As peft.utils.hotswap does after prepare_model_for_compiled_hotswap; inside `frozen` too."""
    stock, patched = both()
    for model in (stock, patched):
        layer_in(model).scaling["default"] = torch.tensor(2.0)
    with frozen(patched):
        patched(x)
        for model in (stock, patched):
            layer_in(model).scaling["default"].fill_(5.0)
        torch.testing.assert_close(patched(x), stock(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_factors_that_are_made_used_once_and_freed(x: Tensor) -> None:
    stock, patched = both()
    own = {name: p.detach() for name, p in stock.named_parameters() if p.requires_grad}
    for guard in (torch.no_grad, lambda: frozen(patched)):
        with guard():
            for step in range(20):
                others = {name: p + (step + 1) * 0.1 for name, p in own.items()}
                found, expected = (functional_call(model, others, (x,)) for model in (patched, stock))
                del others
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frozen_makes_them_once(x: Tensor, made: list[None]) -> None:
    stock, patched = both()
    expected = stock(x)
    for _ in range(3):
        patched(x)
    assert len(made) == 3
    made.clear()
    with frozen(patched):
        for _ in range(3):
            torch.testing.assert_close(patched(x), expected, rtol=1e-5, atol=1e-5)
        assert len(made) == 1
        with frozen(patched):
            patched(x)
        assert len(made) == 2, "whoever vouches for his block vouches for no other"
        patched(x)
        assert len(made) == 2
        with torch.enable_grad():
            patched(x)
        assert len(made) == 3
    for model in (stock, patched):
        factors_through_data(layer_in(model))
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [factors_in_place, scaling_through_its_number, base_through_data])
def test_frozen_sees_what_can_be_seen(change: Change, x: Tensor) -> None:
    stock, patched = both()
    with frozen(patched):
        patched(x)
        for model in (stock, patched):
            change(layer_in(model))
        torch.testing.assert_close(patched(x), stock(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_adapter_of_the_same_name_inside_frozen(x: Tensor) -> None:
    """A server reuses a name: the factors of the second may lie where those of the first were."""
    _, patched = both()
    again = peft.LoraConfig(r=4, target_modules=["layer"], use_dora=True, init_lora_weights=False)
    with frozen(patched):
        for seed in range(10):
            patched(x)
            patched.delete_adapter("default")
            torch.manual_seed(seed)
            patched.add_adapter("default", again)
            patched.set_adapter("default")
            fresh = copy.deepcopy(patched)
            peftkernels.revert(fresh)
            torch.testing.assert_close(patched(x), fresh(x), rtol=1e-5, atol=1e-5)


def test_frozen_ends_with_an_error_too(x: Tensor, made: list[None]) -> None:
    _, patched = both()
    with pytest.raises(RuntimeError, match="mine"), frozen(patched):
        raise RuntimeError("mine")
    with torch.no_grad():
        patched(x), patched(x)
    assert len(made) == 2
    with (
        pytest.raises(ValueError, match="model: found no module that apply_to_peft was called with"),
        frozen(nn.Linear(2, 2)),
    ):
        pass


@torch.no_grad()
def test_a_copy_is_not_frozen(x: Tensor, made: list[None]) -> None:
    _, patched = both()
    with frozen(patched):
        patched(x)
        copied = copy.deepcopy(patched)
        copied(x), copied(x)
    assert len(made) == 3


def test_one_row_gives_what_peft_gives(x: Tensor) -> None:
    """peft makes (1, N) of (K,)."""
    stock, patched = both(lora_dropout=0.5)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = stock.train(mode)(x[0])
        torch.manual_seed(0)
        found = patched.train(mode)(x[0])
        assert found.shape == expected.shape == (1, 24)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def monte_carlo(model: Any) -> None:
    layer_in(model).eval()
    layer_in(model).lora_dropout.train()


def spared(model: Any) -> None:
    layer_in(model).train()
    layer_in(model).lora_dropout.eval()


@pytest.mark.parametrize("switch", [monte_carlo, spared])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_dropout_that_is_switched_by_itself(kind: str, switch: Change, x: Tensor) -> None:
    """Monte-Carlo dropout: peft's DoRA asks the layer whether it drops, its LoRA and AdaLoRA the dropout module."""
    stock = one_layer(kind, lora_dropout=0.5)
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=True)
    varies = []
    for model in (stock, patched):
        switch(model)
        with torch.no_grad():
            varies.append(not torch.equal(model(x), model(x)))
    assert varies[0] == varies[1] == (switch is monte_carlo and kind != "dora")
