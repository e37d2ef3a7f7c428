"""One linear layer with an adapter on the device: every contestant of a case, on inputs and weights that rotate.

A weight may fit into a GPU's L2 cache, and a model never finds it there: calls go round over copies of weight and
inputs that take twice the cache together, the same for every contestant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import data, lineup
from bench.cases import GRAPH, Case
from bench.gpu.device import Device
from bench.gpu.floor import library_linear
from demo.saved import bytes_saved_for_backward
from peftkernels import RankPlan, RankState, lora_linear

# More sets than this only cost memory and time to make.
MOST_SETS = 64


@dataclass(frozen=True)
class Contestant:
    """`calls[i]` maps x (M, K) to y (M, N) on copy i of the weight; `trainable` get gradients; `own` are parameters."""

    calls: Sequence[Callable[[Tensor], Tensor]]
    trainable: tuple[Tensor, ...] = ()
    own: tuple[Tensor, ...] = ()

    @property
    def call(self) -> Callable[[Tensor], Tensor]:
        """On the first copy."""
        return self.calls[0]


class DeviceLayer:
    """The contestants of a layer's case on a device."""

    baseline = lineup.FROZEN
    # Why contestants that were asked for do not take part.
    left_out: dict[str, str]

    def __init__(self, case: Case, device: Device, names: Sequence[str], impl: str = "auto") -> None:
        self.case, self.device, self.impl = case, device, impl
        self.dtype, _ = data.dtypes(case)
        wanted = 2 * device.cache_bytes
        k, n, m, size = case.K, case.N, case.M, self.dtype.itemsize
        self.weights = normal(copies(n * k * size, wanted), (n, k), self.dtype, device, k**-0.5)
        self.bias = normal(1, (n,), self.dtype, device)[0] if case.bias else None
        self.adapter = _moved(data.adapter(case), device)
        self.inputs: Sequence[Tensor] = normal(copies(m * k * size, wanted), (m, k), self.dtype, device)
        self.grads: Sequence[Tensor] = []
        if case.trains:
            self.grads = normal(copies(m * n * size, wanted), (m, n), self.dtype, device)
        self._replays: dict[str, Callable[[], object]] = {}
        self.contestants: dict[str, Contestant] = {}
        self.left_out = {}
        for name in names:
            self._add(name)

    @property
    def weight(self) -> Tensor:
        """The first copy."""
        return self.weights[0]

    @property
    def recorded_calls(self) -> int:
        """How many calls a graph holds: one on each weight and each input at least."""
        return max(len(self.weights), len(self.inputs)) if self.case.timing == GRAPH else 1

    def _add(self, name: str) -> None:
        """Build a contestant; one of peft's that cannot be built and called is left out, with the reason."""
        if not name.startswith("peft "):
            self.contestants[name] = self._build(name)
            return
        try:
            self.contestants[name] = self._build(name)
            self._calls(name, 0, 1)
            self.device.synchronize()
        except Exception as error:
            self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        # Other people's code, compilers among it, on versions that it may not know.
        self.contestants.pop(name, None)
        self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _build(self, name: str) -> Contestant:
        frozen = tuple(self.weights) if self.bias is None else (*self.weights, self.bias)
        if name == lineup.FROZEN:
            return Contestant([self._frozen(weight) for weight in self.weights], (), frozen)
        if name.startswith("peft "):
            return self._peft(name)
        adapter, dropout = self.adapter.copy(self.case.trains), self.case.dropout
        make = self.floor if name == lineup.FLOOR else self._ours
        calls = [make(adapter, dropout, weight) for weight in self.weights]
        return Contestant(calls, adapter.trainable(), (*frozen, *adapter.trainable()))

    def _peft(self, name: str) -> Contestant:
        from bench.peers import frozen_linear, peft_layer

        # Compiled, too, with factors in the layer's own dtype: peft's faster setting.
        kind = lineup.PEFT_LORA_BF16 if name == lineup.COMPILED else name
        layer = peft_layer(kind, self).to(self.device.place)
        layers = [layer, *(twin(layer, frozen_linear(weight, self.bias)) for weight in self.weights[1:])]
        own = tuple(parameter for each in layers for parameter in each.parameters())
        trainable = tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)
        if name != lineup.COMPILED:
            return Contestant(layers, trainable, own)
        run = compiled_call()
        return Contestant([_bound(run, each) for each in layers], trainable, own)

    def _frozen(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        bias = self.bias
        return lambda x: F.linear(x, weight, bias)

    def frozen(self, x: Tensor) -> Tensor:
        """The layer without an adapter."""
        return F.linear(x, self.weight, self.bias)

    def floor(self, adapter: data.Adapter, dropout: float, weight: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """`library_linear` on this layer."""
        active = None
        if adapter.plan is not None and self.case.live < 100:
            active = (adapter.plan.state == int(RankState.ACTIVE)).to(adapter.lora_A.dtype)
        arguments = (adapter.lora_A, adapter.lora_B, self.bias, adapter.gate, active, data.SCALING, dropout)
        layer_weight = self.weight if weight is None else weight
        return lambda x: library_linear(x, layer_weight, *arguments)

    def _ours(self, adapter: data.Adapter, dropout: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return self.fused(adapter, dropout, self.impl, weight=weight)

    def fused(
        self,
        adapter: data.Adapter,
        dropout: float,
        impl: str = "auto",
        seed: int | None = None,
        weight: Tensor | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """`lora_linear` on this layer."""
        layer_weight = self.weight if weight is None else weight

        def call(x: Tensor) -> Tensor:
            return lora_linear(
                x,
                layer_weight,
                adapter.lora_A,
                adapter.lora_B,
                bias=self.bias,
                gate=adapter.gate,
                rank_plan=adapter.plan,
                scaling=data.SCALING,
                dropout_p=dropout,
                dropout_seed=seed,
                impl=impl,
            )

        return call

    def record(self) -> None:
        """Capture everyone's calls; turns replay them from now on. Peers that cannot be captured are left out."""
        for name in list(self.contestants):
            calls = partial(self._calls, name, 0, self.recorded_calls)
            if not name.startswith("peft "):
                self._replays[name] = self.device.capture(calls)
                continue
            try:
                self._replays[name] = self.device.capture(calls)
            except Exception as error:
                self._leave_out(name, error)

    def prepare(self, name: str) -> None:
        """Let whatever came before end."""
        self.device.synchronize()

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` calls, on the inputs from number `first` on; or replays, where `record` was called."""
        replay = self._replays.get(name)
        if replay is None:
            self._calls(name, first, repeats)
            return
        for _ in range(repeats):
            replay()

    def _calls(self, name: str, first: int, repeats: int) -> None:
        contestant, inputs, grads = self.contestants[name], self.inputs, self.grads
        calls, trainable = contestant.calls, contestant.trainable
        if not self.case.trains:
            with torch.no_grad():
                for i in range(first, first + repeats):
                    calls[i % len(calls)](inputs[i % len(inputs)])
            return
        for i in range(first, first + repeats):
            for parameter in trainable:
                parameter.grad = None
            x = inputs[i % len(inputs)].detach().requires_grad_()
            calls[i % len(calls)](x).backward(grads[i % len(grads)])

    def saved_bytes(self, name: str) -> int | None:
        """Bytes kept for backward beside the parameters; None for a forward case."""
        if not self.case.trains:
            return None
        contestant = self.contestants[name]
        x = self.inputs[0].clone().requires_grad_()
        return bytes_saved_for_backward(lambda: contestant.call(x), contestant.own)


def copies(size: int, wanted: int) -> int:
    """How many tensors of `size` bytes take `wanted` bytes together: two at least, MOST_SETS at most."""
    return min(MOST_SETS, max(2, math.ceil(wanted / max(size, 1))))


def normal(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: Device, scale: float = 1.0) -> list[Tensor]:
    """`count` tensors from N(0, scale²), all different."""
    return [torch.randn(shape, dtype=dtype, device=device.place).mul_(scale) for _ in range(count)]


def _moved(adapter: data.Adapter, device: Device) -> data.Adapter:
    plan = None if adapter.plan is None else RankPlan.from_state(adapter.plan.state.to(device.place))
    gate = None if adapter.gate is None else adapter.gate.to(device.place)
    return data.Adapter(adapter.lora_A.to(device.place), adapter.lora_B.to(device.place), gate, plan)


def twin(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    """A peft layer with the parameters of `layer` and another frozen layer beneath."""
    other = object.__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    other._modules = {**layer._modules, "base_layer": linear}
    return other


_compiled: Callable[[nn.Module, Tensor], Tensor] | None = None


def compiled_call() -> Callable[[nn.Module, Tensor], Tensor]:
    """`torch.compile` of a call of a layer, for any number of rows; compiled once for each kind of layer and pass."""
    global _compiled
    if _compiled is None:
        import torch._dynamo
        import torch._inductor.config

        # Workers of its own would compete with what is timed next; falling back to eager would be timed as compiled.
        torch._inductor.config.compile_threads = 1
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        _compiled = torch.compile(_call, dynamic=True)
    return _compiled


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _bound(run: Callable[[Any, Tensor], Tensor], layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: run(layer, x)
