"""What `lora_linear` refuses, and what happens while something records or transforms a call, runs peft's own code."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.peft_models import layer_in, one_layer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import peftkernels
from peftkernels.integrations.peft import NotServedError

KINDS = ("lora", "dora", "adalora")
each_kind = pytest.mark.parametrize("kind", KINDS)
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def both(kind: str, change: Callable[[Any], Any] = lambda model: None, **changes: Any) -> tuple[Any, Any]:
    """A stock model and a patched copy, both changed."""
    stock = one_layer(kind, **changes)
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched)
    for model in (stock, patched):
        change(model)
    return stock, patched


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def told(patched: Any, reason: str) -> None:
    """The calls since the last look all fell back, for this reason."""
    counted = peftkernels.stats(patched, reset=True)
    assert counted.served == 0 and counted.fell_back > 0
    assert all(reason in found for found in counted.reasons), counted.reasons


def trained_scale(model: Any) -> None:
    layer_in(model).scaling["default"] = nn.Parameter(torch.tensor(2.0))


def scale_of_one_element(model: Any) -> None:
    layer_in(model).scaling["default"] = torch.tensor([2.0])


def scale_per_sample(model: Any) -> None:
    layer_in(model).scaling["default"] = torch.linspace(1, 2, len(X)).unsqueeze(1)


def probability_in_a_tensor(model: Any) -> None:
    layer_in(model).lora_dropout["default"].p = torch.tensor(0.3)


@pytest.mark.parametrize(
    ("change", "reason", "kinds"),
    [
        (trained_scale, "scaling: found a tensor that requires grad", "lora dora adalora"),
        (scale_of_one_element, "scaling: found shape (1,)", "lora dora"),
        (scale_per_sample, "scaling: found shape (5, 1)", "lora adalora"),
        (probability_in_a_tensor, "dropout_p: found Tensor", "lora dora adalora"),
    ],
)
def test_numbers_that_the_operator_refuses(change: Callable[[Any], None], reason: str, kinds: str) -> None:
    for kind in kinds.split():
        stock, patched = both(kind, change, lora_dropout=0.5)
        found = []
        for model in (stock, patched):
            torch.manual_seed(0)
            y = model(X)
            y.square().sum().backward()
            found.append([y, *(p.grad for name, p in model.named_parameters() if p.grad is not None)])
        for ours, expected in zip(found[1], found[0], strict=True):
            equal(ours, expected)
        told(patched, reason)
        peftkernels.apply_to_peft(patched, strict=True)
        with pytest.raises(NotServedError) as raised:
            patched(X)
        assert reason in str(raised.value)


@each_kind
def test_a_scaling_tensor_that_is_no_parameter_is_served(kind: str) -> None:
    def change(model: Any) -> None:
        layer_in(model).scaling["default"] = torch.tensor(2.0)

    stock, patched = both(kind, change)
    equal(patched(X), stock(X))
    assert peftkernels.stats(patched).served == 1


@each_kind
def test_numbers_of_numpy(kind: str) -> None:
    """alpha from a search over numpy's values, and an annealed dropout."""

    def change(model: Any) -> None:
        layer_in(model).scaling["default"] = np.float32(1.5)
        layer_in(model).lora_dropout["default"].p = np.float32(0.0)

    stock, patched = both(kind, change, lora_dropout=0.5)
    equal(patched(X), stock(X))
    assert peftkernels.stats(patched).served == 1


def test_annealed_dropout_is_followed() -> None:
    _, patched = both("lora", lora_dropout=0.5)
    dropout = layer_in(patched).lora_dropout["default"]
    dropout.p = 0.0
    assert torch.equal(patched(X), patched(X))
    dropout.p = 0.9
    assert not torch.equal(patched(X), patched(X))
    assert peftkernels.stats(patched).served == 4


def test_dropout_in_place() -> None:
    """It writes to the input of whoever calls the layer."""

    def change(model: Any) -> None:
        layer_in(model).lora_dropout["default"].inplace = True

    stock, patched = both("lora", change, lora_dropout=0.5)
    found = []
    for model in (stock, patched):
        torch.manual_seed(0)
        x = X.clone()
        found.append((model(x), x))
    equal(found[1], found[0])
    told(patched, "the dropout works in place")


def test_factors_of_two_dtypes_under_autocast() -> None:
    stock, patched = both("lora", lambda model: layer_in(model).lora_B["default"].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        equal(patched(X), stock(X))
    told(patched, "lora_B: found dtype torch.bfloat16, expected lora_A's, torch.float32")


def test_factors_of_eight_bits() -> None:
    """In a model that computes with them nowhere, they make peft's error."""
    stock, patched = both("lora", lambda model: layer_in(model).lora_A["default"].to(torch.float8_e4m3fn))
    errors = []
    for model in (stock, patched):
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            model(X)
        errors.append(str(raised.value))
    assert errors[1] == errors[0]
    told(patched, "lora_A: found dtype torch.float8_e4m3fn")


@each_kind
def test_a_sparse_base(kind: str) -> None:
    def change(model: Any) -> None:
        base = layer_in(model).base_layer
        base.weight = nn.Parameter(base.weight.data.to_sparse_csr(), requires_grad=False)

    stock = one_layer(kind)
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched)
    change(stock)
    change(patched)
    try:
        expected = stock(X)
    except Exception as error:
        with pytest.raises(type(error)):
            patched(X)
    else:
        equal(patched(X), expected)
    told(patched, "weight: found layout torch.sparse_csr, expected a dense tensor")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_that_are_not_dense() -> None:
    stock, patched = both("lora")
    with torch.no_grad():
        nested = torch.nested.nested_tensor([X[:2], X[2:]])
        for ours, expected in zip(patched(nested).unbind(), stock(nested).unbind(), strict=True):
            equal(ours, expected)
        told(patched, "x: found a nested tensor, expected a dense one")
        sparse = X.relu().to_sparse()
        equal(patched(sparse), stock(sparse))
        told(patched, "x: found layout torch.sparse_coo, expected a dense tensor")


@each_kind
def test_torch_func(kind: str) -> None:
    stock, patched = both(kind)
    trained = {name: p.detach() for name, p in stock.named_parameters() if p.requires_grad}

    def per_sample(model: Any) -> Any:
        def loss(parameters: Any, x: Tensor) -> Tensor:
            found: Tensor = functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()
            return found

        return vmap(grad(loss), in_dims=(None, 0))(trained, X)

    ways: list[Callable[[Any], Any]] = [
        per_sample,
        lambda model: jvp(model, (X,), (torch.ones_like(X),)),
        lambda model: jacrev(model)(X),
        lambda model: vmap(model)(X.unsqueeze(1)),
    ]
    for way in ways:
        equal(way(patched), way(stock))
        told(patched, "a transform of torch.func is at work")


@each_kind
def test_forward_mode(kind: str) -> None:
    found = []
    stock, patched = both(kind)
    for model in (stock, patched):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(X, torch.ones_like(X)))
            found.append(tuple(forward_ad.unpack_dual(y)))
    equal(found[1], found[0])
    told(patched, "forward-mode differentiation is at work")


@each_kind
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_jit_trace(kind: str, recorded: bool) -> None:
    stock, patched = both(kind)
    traces = []
    for model in (stock.eval(), patched.eval()):
        with torch.set_grad_enabled(recorded):
            traced = torch.jit.trace(model, (X,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traces.append(torch.jit.load(file)(X[:3]))
    equal(traces[1], traces[0])
    # Two traces, to be compared, and a call that is none.
    counted = peftkernels.stats(patched)
    assert counted.reasons == {"torch.jit.trace records the call": 2} and counted.served == 1


def test_an_error_that_is_not_about_arguments_is_not_swallowed() -> None:
    _, patched = both("lora")

    def pack(tensor: Tensor) -> Tensor:
        raise ValueError("of a hook")

    with pytest.raises(ValueError, match="of a hook"), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        patched(X)
    assert peftkernels.stats(patched).fell_back == 0


def test_a_trained_scale_under_compile() -> None:
    stock, patched = both("lora", trained_scale)
    equal(torch.compile(patched, backend="eager")(X), stock(X))


@each_kind
def test_an_adapter_that_was_never_filled(kind: str) -> None:
    """Stock peft computes with it, from memory that nobody wrote, and says nothing."""
    _, patched = both(kind)
    layer = layer_in(patched)
    if kind == "adalora":
        layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"].to("meta"))
    else:
        layer.lora_A["default"].to("meta")
    with pytest.raises(ValueError, match="lora_A: found device meta, expected x's, cpu"):
        patched(X)
    assert peftkernels.stats(patched).fell_back == 0
