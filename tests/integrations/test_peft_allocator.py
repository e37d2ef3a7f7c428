"""HF peft's AdaLoRA allocation on the fused kernels beside peft's own, from identical parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.adalora.model import AdaLoraModel
from support.adalora_pairs import (
    AVERAGES,
    PHASES,
    RUN,
    TARGETS,
    Driver,
    Images,
    Net,
    draw,
    equal,
    inputs,
    make,
    patched,
    record,
    trained,
    use_kernels,
)
from torch import Tensor, nn

from peftkernels.integrations.peft.allocator import (
    PeftKernelsAdaLoraModel,
    PeftKernelsRankAllocator,
    apply_to_adalora_model,
    revert_adalora_model,
)


@pytest.fixture(params=["auto", "eager"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that serve here, and those that serve everywhere."""
    use_kernels(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"deltaT": 5},
        {"deltaT": 5, "tinit": 20, "tfinal": 45},
        {"total_step": 120, "target_r": 1, "beta1": 0.7, "beta2": 0.95, "tfinal": 13},
    ],
    ids=["every-step", "every-5", "phases", "past-the-end"],
)
@pytest.mark.parametrize("impl", ["auto"], indirect=True)
def test_200_steps_equal_peft_to_the_bit(config: dict[str, Any], impl: str) -> None:
    stock = make(**config)
    fused = patched(stock)
    driver = Driver(stock, fused)
    patterns = set()
    for step in range(1, 201):
        driver.step(step)
        patterns.add(repr(stock.peft_config["default"].rank_pattern))
    assert len(patterns) >= 20, "the masks hardly changed"
    assert record(fused).fell_back == 0
    assert record(fused).served > 200


def test_a_real_run_agrees_within_rounding() -> None:
    """Every model with its own loss, term and backward pass."""
    stock = make(total_step=80, tinit=5, tfinal=20)
    models = [stock, patched(stock)]
    optimizers = [torch.optim.SGD(trained(model).values(), lr=0.1) for model in models]
    for step in range(1, 81):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            # Two micro-batches.
            for part in (0, 1):
                loss = model.base_model(*inputs(2 * step + part)).loss
                (loss / 2).backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        assert len({repr(model.peft_config["default"].rank_pattern) for model in models}) == 1
    theirs = trained(models[1])
    for name, parameter in trained(stock).items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6)
    assert record(models[1]).fell_back == 0


@pytest.mark.parametrize("first", [0, 1], ids=["starts-stock", "starts-fused"])
@pytest.mark.parametrize("every", [1, 7])
def test_a_run_may_change_sides_at_any_step(first: int, every: int) -> None:
    stock = make(**PHASES)
    other = copy.deepcopy(stock)
    driver = Driver(stock, other)
    for step in range(1, RUN):
        fused = type(other.base_model) is PeftKernelsAdaLoraModel
        if fused != bool((step // every + first) % 2):
            (revert_adalora_model if fused else apply_to_adalora_model)(other.base_model)
        driver.step(step)
    assert stock.peft_config["default"].rank_pattern is not None


def test_ties_at_the_threshold_all_go(impl: str) -> None:
    def spoil(step: int, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            if "blocks.1" in name:
                # Without gradients scores are zero and tie.
                parameter.grad.zero_()

    stock = make(total_step=30, target_r=4)
    fused = patched(stock)
    Driver(stock, fused, spoil=spoil).run(range(1, 31))
    kept = [sum(mask) for name, mask in stock.peft_config["default"].rank_pattern.items() if "blocks.1" in name]
    assert kept == [0] * 6
    assert record(fused).fell_back == 0


def test_gradients_that_are_not_finite_do_what_they_do_in_peft() -> None:
    def spoil(step: int, parameters: dict[str, nn.Parameter]) -> None:
        if step == 10:
            gradient = next(iter(parameters.values())).grad
            assert gradient is not None
            gradient[0, 0] = torch.inf

    stock = make(**PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused, spoil=spoil)
    driver.without_optimizer = {10}
    driver.run(range(1, RUN))
    assert record(fused).reasons == {"a product of a factor and its gradient is not finite": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_runs_pefts_averages(dtype: torch.dtype) -> None:
    stock = peft.get_peft_model(
        Net().to(dtype),
        peft.AdaLoraConfig(target_modules=TARGETS, init_r=6, target_r=3, **PHASES),
        autocast_adapter_dtype=False,
    )
    draw(stock)
    fused = patched(stock)
    driver = Driver(stock, fused)
    driver.run(range(1, RUN))
    reason = f"the factors are {str(dtype).removeprefix('torch.')}, in which peft keeps and rounds their averages"
    # Averages until step 40, masks at steps 15, 18, …, 39 and 40; later masks need no averages.
    assert record(fused).reasons == {reason: 39 + 9 + 1}
    assert record(fused).served == RUN - 1 - 40


def test_float64_is_served() -> None:
    stock = make(**PHASES).double()
    fused = patched(stock)
    Driver(stock, fused).run(range(1, RUN))
    assert record(fused).fell_back == 0


def test_convolutions_are_served() -> None:
    stock = make(Images(), target_modules=["up", "down", "out"], **PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, RUN):
        driver.step(step, (torch.randn(4, 192, generator=generator), torch.randn(4, 24, generator=generator)))
    assert record(fused).fell_back == 0


def test_another_adapter_that_is_not_trained_stays_as_it_is(impl: str) -> None:
    stock = make(**PHASES)
    other = peft.AdaLoraConfig(target_modules=TARGETS[:2], init_r=4, inference_mode=True, total_step=60)
    stock.add_adapter("other", other)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, RUN))
    assert record(fused).fell_back == 0
    assert all("default" in name for name in fused.base_model.rankallocator.ipt)


def test_names_without_the_adapter_in_the_final_phase(tmp_path: Path) -> None:
    """Saving takes the adapter's name out of the pattern that masks the steps after it."""
    stock = make(**PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused)
    driver.run(range(1, 50))
    for model in driver.models:
        model.save_pretrained(tmp_path)
    assert not any("default" in name for name in fused.peft_config["default"].rank_pattern)
    before = record(fused).fell_back
    driver.run(range(50, RUN))
    assert record(fused).fell_back == before == 0


def test_empty_modules_and_an_allocator_that_is_set_later(impl: str) -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused)
    driver.run(range(1, 25))
    for model in driver.models:
        inner = model.base_model
        pattern = {name: list(mask) for name, mask in inner.peft_config["default"].rank_pattern.items()}
        empty, *rest = pattern
        pattern[empty] = [False] * 6
        for name in rest:
            pattern[name] = [True] * 4 + [False] * 2
        inner.resize_modules_by_rank_pattern(pattern, "default")
        inner.peft_config["default"].target_r = 2
        inner.rankallocator = RankAllocator(inner.model, inner.peft_config["default"], "default")
    driver.optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-3) for model in driver.models]
    driver.run(range(25, RUN))
    assert type(fused.base_model.rankallocator) is PeftKernelsRankAllocator
    assert len(fused.peft_config["default"].rank_pattern[empty]) == 0
    assert record(fused).fell_back == 0


def test_replaced_parameters_keep_their_averages() -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused)
    driver.run(range(1, 20))
    for model in driver.models:
        layer = model.base_model.model.blocks[0].query
        layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"].detach() * 0.5)
        model.base_model.model.blocks[1].value = copy.deepcopy(model.base_model.model.blocks[1].value)
    driver.optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-3) for model in driver.models]
    driver.run(range(20, 30))
    for model in driver.models:
        model.double()
    driver.optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-3) for model in driver.models]
    driver.run(range(30, RUN))
    # One call with averages of the dtype of before, which peft promotes.
    assert record(fused).reasons == {"exp_avg_ipt is not there in the shapes and dtype of the factors": 1}


def test_averages_that_somebody_else_sets_are_taken_in() -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    driver = Driver(stock, fused)
    driver.run(range(1, 20))
    buffer = io.BytesIO()
    torch.save({name: getattr(fused.base_model.rankallocator, name) for name in AVERAGES}, buffer)
    driver.run(range(20, 30))
    for model in driver.models:
        buffer.seek(0)
        for name, saved in torch.load(buffer).items():
            setattr(model.base_model.rankallocator, name, saved)
    driver.run(range(30, 35))
    name = next(iter(stock.base_model.rankallocator.ipt))
    for model in driver.models:
        model.base_model.rankallocator.exp_avg_ipt[name].mul_(3)
        model.base_model.rankallocator.exp_avg_unc[name] = torch.rand(
            model.base_model.rankallocator.ipt[name].shape, generator=torch.Generator().manual_seed(0)
        )
    driver.run(range(35, 38))
    for model in driver.models:
        # peft starts from zero what has no importance.
        del model.base_model.rankallocator.ipt[name]
    for average in AVERAGES[1:]:
        assert fused.base_model.rankallocator.__dict__[average][name].any()
    # Their dictionaries are in different order from here on.
    for step in range(38, RUN):
        stock.base_model(*inputs(step)).loss.backward()
        for (_, one), (_, two) in zip(trained(stock).items(), trained(fused).items(), strict=True):
            assert one.grad is not None
            two.grad = one.grad.clone()
        for model in driver.models:
            model.base_model.update_and_allocate(step)
            model.zero_grad()
        for average in AVERAGES:
            ours = getattr(fused.base_model.rankallocator, average)
            for key, tensor in getattr(stock.base_model.rankallocator, average).items():
                assert equal(tensor, ours[key])
    assert record(fused).fell_back == 0


def _through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Plain:
    """Gives a namespace with the loss; unlike a lambda it can be pickled."""

    def __call__(self, loss: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("pass_on", [copy.deepcopy, _through_pickle, _through_torch_save])
@pytest.mark.parametrize("when", [3, 25, 45])
def test_copies_go_on_as_the_model_would_have(pass_on: Callable[[Any], Any], when: int) -> None:
    stock = make(Net(Plain()), **PHASES)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, when))
    second = pass_on(fused)
    assert type(second.base_model.rankallocator) is PeftKernelsRankAllocator
    assert second.base_model.rankallocator.__dict__["_peftkernels_allocator"] is record(second)
    assert record(second) == record(fused) and record(second) is not record(fused)
    served = record(fused).served
    Driver(copy.deepcopy(stock), second).run(range(when, RUN))
    assert record(fused).served == served and record(second).served > served


def test_files_hold_every_average_once() -> None:
    stock = make(Net(Plain()), **PHASES)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, 5))
    found = len(pickle.dumps(fused.base_model.rankallocator))
    assert found < 1.2 * len(pickle.dumps(stock.base_model.rankallocator))


def test_saved_and_loaded_without_the_kernels(tmp_path: Path) -> None:
    stock = make(**PHASES)
    fused = patched(stock)
    Driver(stock, fused).run(range(1, RUN))
    fused.save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert type(loaded.base_model) is AdaLoraModel
    torch.manual_seed(3)
    stock.save_pretrained(tmp_path / "stock")
    expected = peft.PeftModel.from_pretrained(Net(), tmp_path / "stock", is_trainable=True)
    for model in (loaded, expected):
        model.base_model.model.load_state_dict(
            {
                name: value
                for name, value in fused.base_model.model.state_dict().items()
                if "lora_" not in name and "ranknum" not in name
            },
            strict=False,
        )
    for step in (1, 2):
        assert torch.equal(loaded.base_model(*inputs(step)).loss, expected.base_model(*inputs(step)).loss)
    apply_to_adalora_model(loaded.base_model)
    torch.testing.assert_close(
        loaded.base_model(*inputs(3)).loss, expected.base_model(*inputs(3)).loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("steps", [1, 10, 30, 45])
def test_revert_leaves_nothing_behind(steps: int) -> None:
    model = make(**PHASES)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = [set(thing.__dict__) for thing in (model.base_model, model.base_model.rankallocator)]
    text = repr(model)
    apply_to_adalora_model(model.base_model)
    assert isinstance(model.base_model, AdaLoraModel) and isinstance(model.base_model.rankallocator, RankAllocator)
    assert repr(model) == text
    Driver(model).run(range(1, steps))
    held = model.base_model.rankallocator.exp_avg_ipt
    revert_adalora_model(model.base_model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert type(model.base_model.rankallocator) is RankAllocator
    assert [set(thing.__dict__) for thing in (model.base_model, model.base_model.rankallocator)] == before
    assert model.base_model.rankallocator.exp_avg_ipt is held
    for average in AVERAGES:
        for tensor in getattr(model.base_model.rankallocator, average).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


class Changed(AdaLoraModel):
    pass


def test_what_is_no_adalora_model_of_peft_is_refused() -> None:
    model = make()
    with pytest.raises(TypeError, match=r"found peft\.peft_model\.PeftModel, expected peft.*AdaLoraModel"):
        apply_to_adalora_model(model)
    with pytest.raises(TypeError, match=r"found .*AdaLoraModel, expected one that apply_to_adalora_model was called"):
        revert_adalora_model(model.base_model)
    apply_to_adalora_model(model.base_model)
    with pytest.raises(TypeError, match=r"found .*PeftKernelsAdaLoraModel"):
        apply_to_adalora_model(model.base_model)
    revert_adalora_model(model.base_model)
    model.base_model.__class__ = Changed
    with pytest.raises(TypeError, match="Changed"):
        apply_to_adalora_model(model.base_model)
