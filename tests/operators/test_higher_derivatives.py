"""Derivatives of gradients, forward-mode differentiation, and torch.func's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import Call, make_call
from support.devices import FROZEN_WEIGHTS
from support.direct import by_python
from support.oracle import mask
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from peftkernels import RankPlan, lora_linear
from peftkernels.nn import AdaLoRALinear, LoRALinear

KERNELS = FROZEN_WEIGHTS
ARGUMENTS = ("x", "weight", "lora_A", "lora_B", "bias", "gate")


def _leaves(call: Call, impl: str) -> dict[str, Tensor]:
    """Every argument that can be trained, as one that is."""
    return {
        name: value.detach().clone().requires_grad_(name != "weight" or impl not in FROZEN_WEIGHTS)
        for name, value in call.tensors().items()
    }


def _apply(leaves: dict[str, Tensor], call: Call, impl: str) -> Tensor:
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate")}
    return lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)


def _plain(leaves: dict[str, Tensor], call: Call) -> Tensor:
    """What a user of PyTorch would write, whose derivatives are autograd's own; a masked gate is constant zero."""
    gate = leaves["gate"] * (call.state == 2) if "gate" in leaves else (call.state == 2).to(call.lora_A.dtype)
    shrink = (leaves["x"] * mask(call).to(call.x.device, call.x.dtype)) @ leaves["lora_A"].T
    y = leaves["x"] @ leaves["weight"].T + float(call.scaling) * (shrink * gate.reshape(-1)) @ leaves["lora_B"].T
    return y + leaves["bias"] if "bias" in leaves else y


def _penalties(apply: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives of a penalty on every gradient, beside the loss that they are of."""
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    loss = apply(leaves).square().mean()
    first = torch.autograd.grad(loss, list(trained.values()), create_graph=True)
    penalty = torch.stack([gradient.square().sum() * (2 + at) for at, gradient in enumerate(first)]).sum()
    second = torch.autograd.grad(loss + penalty, list(trained.values()))
    return dict(zip(trained, second, strict=True))


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        largest = value.abs().max()
        assert (found[name] - value).abs().max() <= 2e-5 * largest, f"by {name}: {found[name]} for {value}"


@pytest.mark.parametrize("situation", ["plain", "masked", "dropout", "no_gate"])
def test_a_penalty_on_the_gradients(impl: str, situation: str, seed: int) -> None:
    """WGAN-GP, Sophia, SAM with exact Hessians: each argument's second derivative is what autograd makes of the sum."""
    call = make_call(
        seed,
        gate=situation != "no_gate",
        dropout_p=0.3 if situation == "dropout" else 0.0,
        scaling="tensor" if situation == "masked" else 1.7,
    )
    if situation == "masked":
        # DEAD, not PROBE: a PROBE rank's gate has a gradient that a gate times zero does not have.
        state = torch.tensor([2, 0, 2, 0, 2], dtype=torch.uint8)
        call = call.replace(rank_plan=RankPlan.from_state(state))
    leaves = _leaves(call, impl)
    found = _penalties(lambda given: _apply(given, call, impl), leaves)
    expected = _penalties(lambda given: _plain(given, call), _leaves(call, impl))
    assert found.keys() == expected.keys()
    _assert_close(found, expected)


@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B", "gate"])
def test_a_penalty_where_the_incoming_gradient_is_constant(impl: str, of: str, seed: int) -> None:
    """∂x still depends on the factors, and ∂A on B: a penalty on them must not be left out in silence."""
    call = make_call(seed)
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(apply(leaves), leaves[of], call.grad_y, create_graph=True)[0].square().sum(),
            leaves["lora_B"] if of != "lora_B" else leaves["lora_A"],
        )[0]
        for apply, leaves in (
            (lambda given: _apply(given, call, impl), _leaves(call, impl)),
            (lambda given: _plain(given, call), _leaves(call, impl)),
        )
    )
    _assert_close({"it": found}, {"it": expected})


def test_a_probe_ranks_gate_in_the_second_derivative(impl: str, seed: int) -> None:
    """∂gate of a PROBE rank is scaling · Σ S·H, whose derivatives by A and B are those of this product."""
    call = make_call(seed, r=2, bias=False)
    call = call.replace(rank_plan=RankPlan.from_state(torch.tensor([1, 2], dtype=torch.uint8)))
    leaves = _leaves(call, impl)
    (gate,) = torch.autograd.grad(_apply(leaves, call, impl), leaves["gate"], call.grad_y, create_graph=True)
    found = torch.autograd.grad(gate[0], [leaves["lora_A"], leaves["lora_B"]])
    lora_A, lora_B = (leaves[name].detach().requires_grad_() for name in ("lora_A", "lora_B"))
    expanded, shrink = call.grad_y @ lora_B[:, 0], call.x @ lora_A[0]
    expected = torch.autograd.grad(float(call.scaling) * (expanded * shrink).sum(), [lora_A, lora_B])
    _assert_close(dict(zip("AB", found, strict=True)), dict(zip("AB", expected, strict=True)))


def test_a_second_derivative_by_the_incoming_gradient_alone(impl: str, seed: int) -> None:
    """With frozen factors ∂x depends on nothing but G."""
    call = make_call(seed, bias=False, gate=False)
    y = lora_linear(call.x.requires_grad_(), call.weight, call.lora_A, call.lora_B, scaling=call.scaling, impl=impl)
    grad_y = call.grad_y.requires_grad_()
    (gradient,) = torch.autograd.grad(y, call.x, grad_y, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), grad_y)
    whole = call.weight + float(call.scaling) * call.lora_B @ call.lora_A
    _assert_close({"grad_y": found}, {"grad_y": 2 * (grad_y.detach() @ whole) @ whole.T})


def test_third_derivatives(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(2,), n=3, k=4, r=2)

    def third(apply: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        leaves = _leaves(call, impl)
        value = apply(leaves).square().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, leaves["lora_A"], create_graph=True)
            value = gradient.square().sum()
        return torch.autograd.grad(value, leaves["lora_B"])[0]

    _assert_close(
        {"it": third(lambda given: _apply(given, call, impl))}, {"it": third(lambda given: _plain(given, call))}
    )


def test_a_tensor_in_two_places_is_differentiated_in_each(impl: str, seed: int) -> None:
    call = make_call(seed, n=6, k=6, r=6, gate=False, bias=False)

    def penalty(apply: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        tied = call.lora_A.clone().requires_grad_()
        y = apply({"x": call.x, "weight": call.weight, "lora_A": tied, "lora_B": tied})
        (gradient,) = torch.autograd.grad(y.square().sum(), tied, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tied)[0]

    tied = call.replace(gate=None, bias=None)
    _assert_close(
        {"tied": penalty(lambda given: _apply(given, tied, impl))}, {"tied": penalty(lambda given: _plain(given, tied))}
    )


def test_what_was_not_saved_is_asked_for(impl: str, seed: int) -> None:
    """While A is frozen x is not kept, and a penalty on ∂B that reaches it says so."""
    call = make_call(seed, gate=False, bias=False)
    x, lora_B = call.x.requires_grad_(), call.lora_B.requires_grad_()
    y = lora_linear(x, call.weight, call.lora_A, lora_B, impl=impl)
    (gradient,) = torch.autograd.grad(y, lora_B, call.grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="let lora_A require grad"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", ["bf16", "bf16-fp32_factors"])
def test_a_penalty_in_low_precision(impl: str, dtype: str, seed: int) -> None:
    """As near to float64 as plain PyTorch comes in the same dtypes."""
    call = make_call(seed, dtype=dtype, gate=False, bias=False)
    wide = call.replace(**{name: value.double() for name, value in call.tensors().items()}, grad_y=call.grad_y.double())

    def penalty(call: Call, apply: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        leaves = _leaves(call, impl)
        (gradient,) = torch.autograd.grad(apply(leaves).double().square().sum(), leaves["x"], create_graph=True)
        (found,) = torch.autograd.grad(gradient.double().square().sum(), leaves["lora_A"])
        return found.double()

    exact = penalty(wide, lambda given: _plain(given, wide))
    found = penalty(call, lambda given: _apply(given, call, impl))
    naive = penalty(call, lambda given: _naive(given, call))
    scale = exact.square().mean().sqrt()
    allowed = 2 * (naive - exact).square().mean().sqrt() + 2 * torch.finfo(torch.bfloat16).eps * scale
    assert (found - exact).square().mean().sqrt() <= allowed


def _naive(leaves: dict[str, Tensor], call: Call) -> Tensor:
    shrink = leaves["x"] @ leaves["lora_A"].to(call.x.dtype).T
    return leaves["x"] @ leaves["weight"].T + call.scaling * shrink @ leaves["lora_B"].to(call.x.dtype).T


@pytest.mark.parametrize("transform", ["grad", "vmap", "per_sample", "jacrev", "jvp", "hessian"])
@pytest.mark.parametrize("name", ["auto", "eager", "reference"])
def test_transforms_of_torch_func(name: str, transform: str, seed: int) -> None:
    """What opacus and torch.func users write, through "auto" and what is made of torch's operations."""
    call = make_call(seed, leading=(4,), n=6, k=5, r=3, dropout_p=0.2 if transform != "vmap" else 0.0)
    call = call.replace(rank_plan=RankPlan.from_state(torch.tensor([2, 0, 2], dtype=torch.uint8)))
    leaves = {key: value.detach() for key, value in call.tensors().items()}

    def ours(lora_A: Tensor, x: Tensor) -> Tensor:
        return _apply({**leaves, "lora_A": lora_A, "x": x}, call, name)

    def plain(lora_A: Tensor, x: Tensor) -> Tensor:
        given = {**leaves, "lora_A": lora_A, "x": x}
        return _plain(given, call) if x.dim() > 1 else _plain({**given, "x": x[None]}, call)[0]

    def transformed(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        def loss(lora_A: Tensor, x: Tensor) -> Tensor:
            return function(lora_A, x).square().sum()

        lora_A, x = leaves["lora_A"], leaves["x"]
        if transform == "grad":
            return grad(loss)(lora_A, x)
        if transform == "vmap":
            return vmap(function, (0, None))(torch.stack([lora_A, 2 * lora_A]), x)
        if transform == "per_sample":
            return vmap(grad(loss), (None, 0))(lora_A, x[:, None])
        if transform == "jacrev":
            return jacrev(function)(lora_A, x)
        if transform == "jvp":
            return jvp(lambda factor: function(factor, x), (lora_A,), (lora_A.flip(0),))[1]
        return hessian(loss)(lora_A, x)

    if transform == "per_sample":
        call = call.replace(dropout_p=0.0, dropout_seed=None, x=call.x[:1])
    _assert_close({"it": transformed(ours)}, {"it": transformed(plain)})


@pytest.mark.parametrize("name", KERNELS)
def test_a_named_kernel_refuses_transforms_in_words(name: str, seed: int) -> None:
    call = make_call(seed, gate=False, bias=False)

    def loss(lora_A: Tensor) -> Tensor:
        return lora_linear(call.x, call.weight, lora_A, call.lora_B, impl=name).sum()

    with pytest.raises(RuntimeError, match=rf"impl='{name}' cannot serve this call: it is differentiated by"):
        grad(loss)(call.lora_A)
    words = "forward-mode differentiation, which kernels do not follow"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
        loss(forward_ad.make_dual(call.lora_A, torch.ones_like(call.lora_A)))


def test_a_tangent_is_carried(seed: int) -> None:
    """Forward-mode differentiation, in a level of one's own."""
    call = make_call(seed, bias=False, gate=False)
    tangent = torch.randn(call.x.shape)
    for name in ("auto", "eager", "reference"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(call.x, tangent)
            y = lora_linear(dual, call.weight, call.lora_A, call.lora_B, scaling=call.scaling, impl=name)
            found = forward_ad.unpack_dual(y).tangent
        expected = tangent @ call.weight.T + call.scaling * (tangent @ call.lora_A.T) @ call.lora_B.T
        torch.testing.assert_close(found, expected)


def test_a_call_beside_a_tangent_runs_on_kernels(seed: int) -> None:
    """A level that is open for something else changes no bit."""
    call = make_call(seed)
    expected = _apply(call.tensors(), call, "auto")
    with forward_ad.dual_level():
        found = by_python(lambda: _apply(call.tensors(), call, "auto"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [LoRALinear, AdaLoRALinear])
def test_per_sample_gradients_of_a_layer(kind: type[Any], seed: int) -> None:
    """vmap(grad(functional_call)): each row's gradient is what a backward pass of that row alone gives."""
    torch.manual_seed(seed)
    layer = kind(nn.Linear(7, 5), 3, 6.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    parameters = {name: value.detach() for name, value in layer.named_parameters() if value.requires_grad}
    x = torch.randn(4, 7)

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, given, (row[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for at in range(4):
        layer.zero_grad()
        layer(x[at : at + 1]).square().sum().backward()
        alone = {name: value.grad for name, value in layer.named_parameters() if value.requires_grad}
        _assert_close({name: value[at] for name, value in found.items()}, alone)
