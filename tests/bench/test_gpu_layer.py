"""Contestants on a device, the floor among them, and what their verification catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import lineup
from bench.cases import BACKWARD, DEAD, FORWARD, GRAPH, PROBE, Case
from bench.gpu import layer as layers
from bench.gpu import verify as sampled
from bench.gpu.cases import contestants
from bench.gpu.device import Host
from bench.gpu.floor import library_linear
from bench.gpu.layer import DeviceLayer, copies, twin
from bench.gpu.verify import oracle, sampled_rows, verify
from bench.verify import WrongResultError
from peftkernels.ops import reference

HOST = Host(torch.device("cpu"))
SMALL = {"K": 48, "N": 40, "M": 24, "r": 8, "dtype": "bf16"}
RIGHT = {
    "forward": Case(direction=FORWARD, **SMALL),
    "plain": Case(direction=BACKWARD, **SMALL),
    "no bias": Case(direction=BACKWARD, bias=False, **SMALL),
    "mixed": Case(direction=BACKWARD, **{**SMALL, "dtype": "mixed"}),
    "gate": Case(direction=BACKWARD, masking=PROBE, **SMALL),
    "PROBE": Case(direction=BACKWARD, masking=PROBE, live=50, **SMALL),
    "DEAD": Case(direction=BACKWARD, masking=DEAD, live=25, **SMALL),
    "dropout": Case(direction=BACKWARD, dropout=0.1, **SMALL),
}


def _bench(case: Case, *, peft: bool = False, device: Host = HOST) -> DeviceLayer:
    return DeviceLayer(case, device, contestants(case, peft=peft), "eager")


@pytest.mark.parametrize("name", RIGHT)
def test_right_results_pass_with_every_peer(name: str) -> None:
    bench = _bench(RIGHT[name], peft=True)
    verify(bench)
    assert tuple(bench.contestants) == contestants(RIGHT[name]) and not bench.left_out


@pytest.mark.parametrize("name", RIGHT)
def test_the_oracle_is_the_reference(name: str) -> None:
    """All rows at once, in float64, by `reference.py` itself."""
    case = RIGHT[name]
    bench = _bench(case)
    found = oracle(bench, case.dropout, torch.arange(case.M))
    weight, adapter = bench.weight.double(), bench.adapter.double()
    bias, gate = None if bench.bias is None else bench.bias.double(), adapter.gate
    seed = torch.tensor(sampled.SEED) if case.dropout else None
    call = adapter.call_of(bench.inputs[0].double(), weight, bias, case.dropout, seed).forward(weight, True)
    y, shrink = reference.lora_linear_forward(call)
    torch.testing.assert_close(found["y"], y)
    if case.trains:
        backward = call._replace(given_shrink=shrink).backward(bench.grads[0].double(), [True] * 6)
        grads = reference.lora_linear_backward(backward)
        for what, right in (("∂x", grads[0]), ("∂lora_A", grads[2]), ("∂lora_B", grads[3])):
            torch.testing.assert_close(found[what], right)
        assert ("∂gate" in found) == (gate is not None)
        if gate is not None:
            torch.testing.assert_close(found["∂gate"], grads[5])
        some = torch.tensor([0, 5, 23])
        part = oracle(bench, case.dropout, some)
        assert torch.equal(part["∂x"], found["∂x"][some]) or torch.allclose(part["∂x"], found["∂x"][some])
        torch.testing.assert_close(part["∂lora_A"], found["∂lora_A"])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True])
def test_the_floor_differentiates_what_it_computes(dropout: float, gated: bool) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    active = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) if gated else None

    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor, *gate: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask in every evaluation
        return library_linear(x, weight, lora_A, lora_B, bias, gate[0] if gate else None, active, 2.0, dropout)

    arguments = (draw(4, 6), draw(3, 6), draw(5, 3), *((draw(3),) if gated else ()))
    if not gated:
        assert torch.autograd.gradcheck(call, arguments)
        return
    # The gate of a rank that is not ACTIVE has the gradient of a PROBE rank, which no difference quotient shows.
    assert torch.autograd.gradcheck(lambda *most: call(*most, arguments[3].detach()), arguments[:3])
    y = call(*arguments)
    (found,) = torch.autograd.grad(y.sum(), arguments[3])
    everyone = torch.autograd.functional.jacobian(
        lambda gate: library_linear(*arguments[:1], weight, *arguments[1:3], bias, gate, None, 2.0).sum(), arguments[3]
    )
    if not dropout:
        torch.testing.assert_close(found, everyone)


def test_the_floor_drops_what_dropout_drops() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(400, 32), torch.zeros(8, 32)
    lora_A, lora_B = torch.eye(8, 32), torch.eye(8)
    y = library_linear(x, weight, lora_A, lora_B, scaling=3.0, dropout=0.25)
    kept = y != 0
    assert 0.70 < kept.float().mean() < 0.80
    torch.testing.assert_close(y[kept], (4 * x[:, :8])[kept])


class _Faulty(torch.autograd.Function):
    """A sound forward pass whose ∂y is spoilt on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.cat([grad[:-1], torch.zeros_like(grad[-1:])])


def _element(y: Tensor, value: float) -> Tensor:
    spoilt = y.clone()
    spoilt.view(-1)[17] = value
    return spoilt


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "y": lambda y: _element(y, 9.0),
    "∂x": _Faulty.apply,
    "NaN": lambda y: _element(y, float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [lineup.OURS, lineup.FLOOR])
def test_a_wrong_result_is_caught(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = "lora_linear" if name == lineup.OURS else "library_linear"
    sound = getattr(layers, function)
    monkeypatch.setattr(layers, function, lambda *a, **k: FAULTS[fault](sound(*a, **k)))
    what = "y is wrong: it holds elements that are not finite" if fault == "NaN" else f"{fault} is wrong"
    with pytest.raises(WrongResultError, match=rf"{name.replace('+', '.')}: {what}"):
        verify(_bench(RIGHT["no bias"]))


@pytest.mark.parametrize("name", ["forward", "dropout", "DEAD"])
def test_a_scaled_adapter_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = layers.lora_linear
    monkeypatch.setattr(layers, "lora_linear", lambda *a, **k: sound(*a, **{**k, "scaling": 1.01 * k["scaling"]}))
    with pytest.raises(WrongResultError, match=f"{lineup.OURS}: "):
        verify(_bench(replace(RIGHT[name], dtype="fp32")))


def test_allocations_are_poisoned_while_results_are_verified() -> None:
    with sampled.poisoned_allocations():
        assert torch.empty(3).isnan().all() and torch.empty(2, 2, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_that_nobody_writes_are_caught_outside_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "sampled_rows", lambda count, products: torch.tensor([0, count - 1]))

    def unwritten(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        y[[0, 1, -1]] = 0
        return y

    monkeypatch.setattr(layers, "lora_linear", unwritten)
    with pytest.raises(
        WrongResultError, match="y is wrong: it holds elements that are not finite, or that nobody wrote"
    ):
        verify(_bench(RIGHT["forward"]))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_sample_has_the_edges_and_others_each_time() -> None:
    assert torch.equal(sampled_rows(2048, 1), torch.arange(2048))
    first, second = (sampled_rows(16384, 1 << 40) for _ in range(2))
    assert len(first) == len(set(first.tolist())) == sampled.SAMPLED_ROWS and torch.equal(first, first.sort().values)
    assert set(range(16)) | set(range(16384 - 16, 16384)) <= set(first.tolist())
    assert not torch.equal(first, second)
    assert torch.equal(sampled_rows(300, 1 << 40), torch.arange(300))


def test_weights_and_inputs_rotate_over_twice_the_cache() -> None:
    assert copies(100, 1000) == 10 and copies(2000, 1000) == 2 and copies(1, 1 << 30) == layers.MOST_SETS
    bench = _bench(RIGHT["plain"], device=replace(HOST, cache_bytes=20_000))
    # 40 × 48, 24 × 48 and 24 × 40 bf16 numbers are 3840, 2304 and 1920 bytes.
    assert [len(bench.weights), len(bench.inputs), len(bench.grads)] == [11, 18, 21]
    seen: list[tuple[int, int]] = []
    weights, inputs = bench.weights, [x.data_ptr() for x in bench.inputs]
    bench.contestants[lineup.FROZEN] = layers.Contestant(
        [_watched(weight, number, inputs, seen) for number, weight in enumerate(weights)]
    )
    bench.turn(lineup.FROZEN, 5, 40)
    assert seen == [((5 + i) % 11, (5 + i) % 18) for i in range(40)]


def _watched(weight: Tensor, number: int, inputs: list[int], seen: list[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        seen.append((number, inputs.index(x.data_ptr())))
        return torch.nn.functional.linear(x, weight)

    return call


@pytest.mark.parametrize("name", ["plain", "PROBE"])
def test_every_copy_of_a_weight_is_the_one_that_is_used(name: str) -> None:
    """peft's twins share adapters, not the frozen layer: on copy 1 they compute what ours does there."""
    bench = _bench(RIGHT[name], peft=True)
    x = bench.inputs[0]
    assert not torch.equal(bench.weights[0], bench.weights[1])
    with torch.no_grad():
        right = bench.contestants[lineup.OURS].calls[1](x).double()
        for contestant, found in bench.contestants.items():
            if contestant != lineup.FROZEN:
                assert len(found.calls) == len(bench.weights)
                difference = (found.calls[1](x).double() - right).norm() / right.norm()
                assert difference < 0.02, contestant


def test_turns_leave_gradients_on_whoever_trains() -> None:
    bench = _bench(RIGHT["mixed"], peft=True)
    for name, found in bench.contestants.items():
        bench.turn(name, 3, 2)
        assert all(p.grad is not None for p in found.trainable), name
        assert bool(found.trainable) == (name != lineup.FROZEN)


def test_recorded_calls_are_replayed() -> None:
    case = replace(RIGHT["plain"], timing=GRAPH)
    bench = _bench(case, device=replace(HOST, cache_bytes=20_000))
    assert bench.recorded_calls == 18
    counted: list[int] = []

    def call(x: Tensor) -> Tensor:
        counted.append(1)
        return x.sum()[None, None].expand(24, 40)

    bench.contestants = {lineup.FROZEN: layers.Contestant([call])}
    bench.record()
    counted.clear()
    bench.turn(lineup.FROZEN, 0, 3)
    assert len(counted) == 3 * 18


def test_a_peer_that_cannot_be_built_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import peers

    sound = peers.peft_layer

    def broken(name: str, bench: Any) -> Any:
        if name == lineup.PEFT_LORA_FP32:
            raise RuntimeError("a version that does not fit\nand more")
        return sound(name, bench)

    monkeypatch.setattr(peers, "peft_layer", broken)
    bench = _bench(RIGHT["plain"], peft=True)
    assert bench.left_out == {lineup.PEFT_LORA_FP32: "RuntimeError: a version that does not fit"}
    assert set(bench.contestants) == set(contestants(RIGHT["plain"])) - {lineup.PEFT_LORA_FP32}
    verify(bench)


def test_copies_of_a_layer_are_compiled_once() -> None:
    """Another weight or another number of rows must not be compiled anew while others are timed."""
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile has no C++ compiler here: {error}")
    from torch._dynamo.utils import counters

    counters.clear()
    names = (lineup.FROZEN, lineup.COMPILED)
    for rows in (32, 48, 80):
        bench = DeviceLayer(Case(direction=FORWARD, **{**SMALL, "M": rows}), HOST, names)
        assert len(bench.weights) > 10 and not bench.left_out
        bench.turn(lineup.COMPILED, 0, len(bench.weights))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_twin_has_the_parameters_of_its_layer_and_another_frozen_one() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = torch.nn.Linear(3, 2)
            self.lora = torch.nn.Linear(3, 2)

    original, other = Layer(), torch.nn.Linear(3, 2)
    found = twin(original, other)
    assert found.base_layer is other and original.base_layer is not other
    assert found.lora is original.lora and isinstance(found, Layer)
