"""HF peft's AdaLoRA allocation on the fused kernels beside peft's own, from identical parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="the comparison with HF peft needs peft installed")

from peft.tuners.adalora import layer as peft_layer  # noqa: E402
from peft.tuners.adalora.layer import RankAllocator  # noqa: E402
from peft.tuners.adalora.model import AdaLoraModel  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from peftkernels.allocation import kernels as allocation_kernels  # noqa: E402
from peftkernels.integrations.peft import allocator_factors  # noqa: E402
from peftkernels.integrations.peft.allocator import (  # noqa: E402
    AllocatorRecord,
    PeftKernelsAdaLoraModel,
    PeftKernelsRankAllocator,
    apply_to_adalora_model,
    revert_adalora_model,
)

TARGETS = ["query", "key", "value", "out", "up", "down"]
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PHASES = {"total_step": 60, "tinit": 12, "tfinal": 20, "deltaT": 3}
# Of steps in these phases: warm-up, decreasing budget, last allocation, final.
RUN = 66


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 20) for _ in range(3))
        self.out = nn.Linear(20, 24, bias=False)
        self.up, self.down = nn.Linear(24, 37), nn.Linear(37, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        x = x + self.out(weights @ self.value(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any] = lambda loss: SimpleNamespace(loss=loss)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.give = give

    def forward(self, x: Tensor, target: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.give((x - target).square().mean())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3)
        self.out = nn.Linear(108, 24)

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        x = x.reshape(-1, 3, 8, 8)
        x = self.out(torch.tanh(self.down(torch.tanh(self.up(x)))).flatten(1))
        return SimpleNamespace(loss=(x - target.reshape(-1, 24)[: len(x)]).square().mean())


def draw(model: nn.Module, std: float = 0.05) -> None:
    """Factors that are not zero, E included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make(base: nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(3)
    settings = {"target_modules": TARGETS, "init_r": 6, "target_r": 3, "total_step": 200} | config
    model = peft.get_peft_model(base or Net(), peft.AdaLoraConfig(**settings))
    draw(model)
    return model


def patched(model: Any) -> Any:
    model = copy.deepcopy(model)
    apply_to_adalora_model(model.base_model)
    return model


def record(model: Any) -> AllocatorRecord:
    return model.base_model._peftkernels_allocator


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, 8, 24, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


class Driver:
    """Trains models side by side on the gradients of the first, and compares them after every step."""

    def __init__(self, *models: Any, spoil: Callable[[int, dict[str, nn.Parameter]], None] | None = None) -> None:
        self.models = list(models)
        self.spoil = spoil
        # Where a gradient scaler would have left them out.
        self.without_optimizer: set[int] = set()
        self.optimizers = [torch.optim.AdamW(trained(model).values(), lr=5e-3) for model in models]

    def step(self, step: int, x: tuple[Tensor, Tensor] | None = None) -> None:
        first = trained(self.models[0])
        dtype = next(iter(first.values())).dtype
        self.models[0].base_model(*(x or inputs(step, dtype))).loss.backward()
        if self.spoil is not None:
            self.spoil(step, first)
        for model in self.models[1:]:
            for name, parameter in trained(model).items():
                gradient = first[name].grad
                parameter.grad = None if gradient is None else gradient.clone()
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            if step not in self.without_optimizer:
                optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        for model in self.models[1:]:
            assert_same(self.models[0], model)

    def run(self, steps: range) -> None:
        for step in steps:
            self.step(step)


def assert_same(stock: Any, other: Any) -> None:
    """Parameters, rank pattern and averages, to the bit."""
    theirs = dict(other.named_parameters())
    for name, parameter in stock.named_parameters():
        assert equal(parameter, theirs[name]), name
    assert stock.peft_config["default"].rank_pattern == other.peft_config["default"].rank_pattern
    for average in AVERAGES:
        expected = getattr(stock.base_model.rankallocator, average)
        found = getattr(other.base_model.rankallocator, average)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert equal(tensor, found[name]), (average, name)


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))


@pytest.fixture(params=["auto", "plain"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that serve here, and those that serve everywhere."""
    monkeypatch.setattr(
        allocator_factors,
        "kernels_for",
        lambda device, dtype: allocation_kernels.kernels_for(device, dtype, request.param),
    )
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
