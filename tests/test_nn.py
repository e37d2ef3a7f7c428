"""LoRALinear and AdaLoRALinear: results, merging, checkpoints in both directions with HF peft, compilation."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from peftkernels import RankState
from peftkernels.nn import AdaLoRALinear, LoRALinear

KINDS = {"lora": LoRALinear, "adalora": AdaLoRALinear}
Layer = LoRALinear | AdaLoRALinear


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices here are tiny: threads only wait for each other, for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _layer(
    kind: str, *, n: int = 7, k: int = 11, r: int = 4, bias: bool = True, seed: int = 0, **arguments: Any
) -> Layer:
    """A layer whose adapter contributes: no factor is zero."""
    torch.manual_seed(seed)
    layer = KINDS[kind].from_linear(nn.Linear(k, n, bias=bias), r, **{"lora_alpha": 6, **arguments})
    with torch.no_grad():
        for parameter in _factors(layer):
            parameter.normal_(std=0.5)
    return layer


def _factors(layer: Layer) -> list[nn.Parameter]:
    if isinstance(layer, LoRALinear):
        return [layer.lora_A.weight, layer.lora_B.weight]
    return [layer.lora_A, layer.lora_B, layer.lora_E]


class _Half(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def _set_states(layer: AdaLoRALinear, states: list[int]) -> None:
    layer.rank_plan.update_(torch.tensor(states, dtype=torch.uint8))


def _formula(layer: Layer, x: Tensor) -> Tensor:
    """The docstring's formula in float64."""
    factors = [factor.double() for factor in _factors(layer)]
    gate = torch.ones(layer.r, dtype=torch.float64)
    if isinstance(layer, AdaLoRALinear):
        gate = factors[2].flatten() * (layer.rank_state == RankState.ACTIVE)
    bias = None if layer.bias is None else layer.bias.double()
    base = F.linear(x.double(), layer.base_layer.weight.double(), bias)
    return base + layer.scaling * ((x.double() @ factors[0].T) * gate) @ factors[1].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_formula(kind: str, bias: bool) -> None:
    layer = _layer(kind, bias=bias)
    if isinstance(layer, AdaLoRALinear):
        _set_states(layer, [2, 1, 2, 0])
    x = torch.randn(2, 5, 11)
    torch.testing.assert_close(layer(x).double(), _formula(layer, x), rtol=1e-5, atol=1e-5)
    layer.double()
    torch.testing.assert_close(layer(x.double()), _formula(layer, x), rtol=1e-13, atol=1e-13)


def test_scaling() -> None:
    linear = nn.Linear(5, 3)
    assert LoRALinear.from_linear(linear, 4, 6).scaling == 1.5
    assert AdaLoRALinear.from_linear(linear, 4, 6).scaling == 6 / (4 + 1e-5)
    for r in (4, 12):
        layer = AdaLoRALinear.from_linear(linear, r)
        assert layer.lora_alpha == 4 * r
        assert layer.scaling == 4 * r / (r + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 12, 8).scaling == 8 / (12 + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 4, 0).scaling == 4 / (4 + 1e-5)
    assert AdaLoRALinear.from_linear(linear, 4, -3).scaling == 4 / (4 + 1e-5)


def test_initial_values() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 200)
    x = torch.randn(4, 300)
    expected = linear(x)
    lora = LoRALinear.from_linear(linear, 16, 16)
    bound = 1 / math.sqrt(300)  # kaiming_uniform with a = √5
    largest = lora.lora_A.weight.abs().max().item()
    assert 0.98 * bound < largest <= bound
    assert not lora.lora_B.weight.any()
    torch.testing.assert_close(lora(x), expected)
    adalora = AdaLoRALinear.from_linear(linear, 16)
    for factor in (adalora.lora_A, adalora.lora_B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(factor.mean().item()) < 0.002
    assert not adalora.lora_E.any()
    assert adalora.rank_state.tolist() == [RankState.ACTIVE] * 16
    assert adalora.rank_plan.counts.tolist() == [16, 16]
    torch.testing.assert_close(adalora(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_shared_and_frozen(kind: str) -> None:
    linear = nn.Linear(11, 7)
    layer = KINDS[kind].from_linear(linear, 4, 6)
    assert layer.base_layer is linear
    assert layer.base_layer.weight is linear.weight
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    layer(torch.randn(3, 11)).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None
    assert all(factor.grad is not None for factor in _factors(layer))
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(factor) for factor in _factors(layer)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_half_precision_base_are_float32(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind].from_linear(nn.Linear(11, 7).to(dtype), 4, 6)
    assert {factor.dtype for factor in _factors(layer)} == {torch.float32}
    assert layer(torch.randn(3, 11, dtype=dtype)).dtype == dtype
    assert {factor.dtype for factor in _factors(KINDS[kind].from_linear(nn.Linear(11, 7).double(), 4, 6))} == {
        torch.float64
    }


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only_and_on_the_adapter_only(kind: str) -> None:
    layer = _layer(kind, lora_dropout=0.5)
    x = torch.randn(64, 11)
    without = _layer(kind)
    assert torch.equal(layer.eval()(x), without(x))
    torch.manual_seed(1)
    first = layer.train()(x)
    second = layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    all_dropped = _layer(kind, lora_dropout=1.0)
    torch.testing.assert_close(all_dropped(x), all_dropped.base_layer(x))


def test_probe_and_dead_ranks() -> None:
    layer = _layer("adalora")
    _set_states(layer, [2, 1, 0, 2])
    layer(torch.randn(6, 11)).square().sum().backward()
    grad_A, grad_B, grad_E = (factor.grad for factor in _factors(layer))
    assert grad_A.any(1).tolist() == [True, False, False, True]
    assert grad_B.any(0).tolist() == [True, False, False, True]
    assert (grad_E.flatten() != 0).tolist() == [True, True, False, True]


def test_gradients_equal_pefts() -> None:
    """Same factors, same upstream gradient, in float64."""
    peft_lora = pytest.importorskip("peft.tuners.lora", reason="the comparison with HF peft needs peft installed")
    peft_adalora = pytest.importorskip("peft.tuners.adalora", reason="the comparison with HF peft needs peft installed")
    adalora = pytest.importorskip("peft", reason="the comparison with HF peft needs peft installed").AdaLoraConfig
    for kind in KINDS:
        layer = _layer(kind).double()
        base = copy.deepcopy(layer.base_layer)
        if kind == "lora":
            config = peft_lora.LoraConfig(r=4, lora_alpha=6)
            theirs = peft_lora.Linear(base, "default", config=config, r=4, lora_alpha=6)
            own = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
        else:
            theirs = peft_adalora.SVDLinear(base, "default", config=adalora(total_step=5), r=4, lora_alpha=6)
            own = [theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_E["default"]]
        with torch.no_grad():
            for their_factor, factor in zip(own, _factors(layer), strict=True):
                their_factor.copy_(factor)
        x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(6, 7, dtype=torch.float64)
        y, their_y = layer(x), theirs(x)
        torch.testing.assert_close(y, their_y, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(y, [x, *_factors(layer)], upstream)
        expected = torch.autograd.grad(their_y, [x, *own], upstream)
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


ARGUMENTS = [
    ({"linear": nn.Conv1d(3, 3, 1)}, TypeError, "linear: found Conv1d, expected a torch.nn.Linear"),
    ({"r": 2.0}, TypeError, r"r: found 2.0 \(float\), expected an int"),
    ({"r": True}, TypeError, "r: found True"),
    ({"r": -1}, ValueError, "r: found -1, expected at least"),
    ({"lora_alpha": "8"}, TypeError, "lora_alpha: found '8'"),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha: found nan, expected a finite number"),
    ({"lora_dropout": 1.5}, ValueError, r"lora_dropout: found 1.5, expected a probability in \[0, 1\]"),
    ({"lora_dropout": None}, TypeError, "lora_dropout: found None"),
    ({"impl": "fast"}, ValueError, "impl: found 'fast', expected 'auto' or one of reference, eager"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_arguments_are_checked(kind: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    linear = nn.Linear(3, 3)
    with pytest.raises(error, match=message):
        KINDS[kind].from_linear(**{"linear": linear, "r": 2, "lora_alpha": 8, **arguments})
    # A refused call leaves the layer as it was.
    assert linear.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_that_do_more_are_refused(kind: str) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, arguments, output: output)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    whole_numbers = nn.Linear(3, 3)
    whole_numbers.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int32), requires_grad=False)
    for linear, error, message in [
        (Doubling(3, 3), TypeError, "Doubling with a forward of its own"),
        (patched, TypeError, "with a forward of its own"),
        (hooked, ValueError, "found forward hooks"),
        (parametrized, ValueError, "parametrized"),
        (whole_numbers, TypeError, r"found weight dtype torch\.int32"),
    ]:
        with pytest.raises(error, match=message):
            KINDS[kind].from_linear(linear, 2, 8)


def test_rank_zero() -> None:
    with pytest.raises(ValueError, match="r: found 0, expected at least 1"):
        LoRALinear.from_linear(nn.Linear(3, 3), 0, 8)
    layer = AdaLoRALinear.from_linear(nn.Linear(3, 3), 0)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.merge()
    layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, dtype: torch.dtype) -> None:
    layer = _layer(kind)
    layer.base_layer.to(dtype)
    if isinstance(layer, AdaLoRALinear):
        _set_states(layer, [2, 1, 0, 2])
        with torch.no_grad():
            layer.lora_E[2] = math.nan  # DEAD: must not leak
    original = layer.base_layer.weight.detach().clone()
    parameter, version = layer.base_layer.weight, layer.base_layer.weight._version
    x = torch.randn(5, 11, dtype=dtype)
    expected = _formula(layer, x) if kind == "lora" else _formula_without_dead(layer, x)

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
    return _formula(alive, x)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_survives_copies_casts_and_checkpoints(kind: str) -> None:
    layer = _layer(kind)
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

    other = _layer(kind, seed=1)
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind: str) -> None:
    layer = _layer(kind, lora_dropout=0.25)
    if isinstance(layer, AdaLoRALinear):
        _set_states(layer, [2, 0, 1, 2])
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
            _factors(duplicate)[1].zero_()
        torch.testing.assert_close(duplicate(x), duplicate.base_layer(x))
        if isinstance(duplicate, AdaLoRALinear):
            assert isinstance(layer, AdaLoRALinear)
            _set_states(duplicate, [0, 0, 0, 0])
            assert layer.rank_state.tolist() == [2, 0, 1, 2]
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_cast_leaves_the_plan() -> None:
    layer = _layer("adalora")
    _set_states(layer, [2, 0, 1, 2])
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
    torch.testing.assert_close(layer(x).double(), _formula(layer, x), rtol=0.02, atol=0.05)


def test_repr_says_what_the_layer_is() -> None:
    text = repr(_layer("adalora", lora_dropout=0.1, impl="eager"))
    first = text.splitlines()[0] + text.splitlines()[1]
    for part in ("AdaLoRALinear", "in_features=11", "out_features=7", "r=4", "lora_alpha=6", "lora_dropout=0.1"):
        assert part in first
    assert "impl='eager'" in first


# Checkpoints


def test_state_dict_keys() -> None:
    base = ["base_layer.weight", "base_layer.bias"]
    assert sorted(_layer("lora").state_dict()) == sorted([*base, "lora_A.weight", "lora_B.weight"])
    adalora = sorted([*base, "lora_A", "lora_B", "lora_E", "rank_state"])
    assert sorted(_layer("adalora").state_dict()) == adalora


@pytest.mark.parametrize("kind", KINDS)
def test_strict_round_trip_in_place(kind: str) -> None:
    source = nn.ModuleDict({"deep": nn.Sequential(_layer(kind))})
    target = nn.ModuleDict({"deep": nn.Sequential(_layer(kind, seed=1))})
    layer, other = source["deep"][0], target["deep"][0]
    if isinstance(layer, AdaLoRALinear):
        _set_states(layer, [0, 2, 1, 2])
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
    layer = _layer("adalora")
    _set_states(layer, [0, 0, 1, 2])
    state = {name: value for name, value in _layer("adalora", seed=1).state_dict().items() if name != "rank_state"}
    layer.load_state_dict(state)
    assert layer.rank_state.tolist() == [2, 2, 2, 2]
    assert layer.rank_counts.tolist() == [4, 4]
    # A partial checkpoint without factors leaves the states alone.
    _set_states(layer, [0, 0, 1, 2])
    layer.load_state_dict({"base_layer.weight": state["base_layer.weight"]}, strict=False)
    assert layer.rank_state.tolist() == [0, 0, 1, 2]


def test_states_that_are_none_are_refused() -> None:
    layer = _layer("adalora")
    state = layer.state_dict() | {"rank_state": torch.tensor([0, 1, 2, 3], dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match='"rank_state": found value 3, expected 0, 1 or 2'):
        layer.load_state_dict(state)
    assert layer.rank_state.tolist() == [2, 2, 2, 2]


def test_assigning_to_a_layer_on_meta() -> None:
    source = _layer("adalora")
    _set_states(source, [1, 2, 0, 2])
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
    return nn.Sequential(_layer(kind, seed=3), _layer(kind, n=11, k=7, seed=4))


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
    ours = nn.Sequential(_layer("adalora", r=3), _layer("adalora", n=11, k=7, r=3))
    with pytest.raises(RuntimeError, match=r'"0\.ranknum": found 4, expected 3: the adapter was trained with scaling'):
        ours.load_state_dict(theirs.base_model.model.state_dict())


# Compilation and functional use


def test_compiles_once_whatever_masks_and_gates() -> None:
    model = _our_model("adalora").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 11)
    compiled(x).sum().backward()
    torch._dynamo.config.error_on_recompile = True
    try:
        for states in ([2, 1, 2, 0], [0, 0, 1, 1], [2, 2, 2, 2]):
            for layer in model:
                _set_states(layer, states)
                with torch.no_grad():
                    layer.lora_E.normal_()
            model.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
            model.zero_grad()
            expected = model(x)
            expected.square().sum().backward()
            assert torch.equal(y, expected)
            plain = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            torch.testing.assert_close(gradients, plain, rtol=1e-6, atol=1e-6)
            assert all((gradient != 0).any() for gradient in plain) == (2 in states)
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    layer, other = _layer(kind), _layer(kind, seed=1)
    if isinstance(other, AdaLoRALinear):
        _set_states(other, [0, 2, 2, 1])
    x = torch.randn(3, 11)
    replaced = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, replaced, (x,)), other(x))
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pruned", "parametrized", "plain_tensor"])
def test_what_stands_in_a_parameters_place_is_used(kind: str, how: str) -> None:
    """For a factor, and for the base layer's weight, where it was put there after the layer was made."""
    layer, expected = _layer(kind), _layer(kind)
    factor_of = layer.lora_A if isinstance(layer, LoRALinear) else layer
    name = "weight" if isinstance(layer, LoRALinear) else "lora_A"
    for module, attribute in ((factor_of, name), (layer.base_layer, "weight")):
        value = getattr(module, attribute).detach().clone()
        if how == "pruned":
            prune.custom_from_mask(module, attribute, torch.full_like(value, 0.5))
        elif how == "parametrized":
            parametrize.register_parametrization(module, attribute, _Half())
        else:
            delattr(module, attribute)
            setattr(module, attribute, value / 2)
    with torch.no_grad():
        _factors(expected)[0].mul_(0.5)
        expected.base_layer.weight.mul_(0.5)
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(3, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), _formula(layer, x), rtol=0.03, atol=0.1)
    y.float().sum().backward()
    assert {factor.grad.dtype for factor in _factors(layer)} == {torch.float32}
