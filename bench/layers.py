"""One linear layer with an adapter: every contestant of a case as a function of x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import data, lineup
from bench.cases import Case
from demo.saved import bytes_saved_for_backward
from peftkernels import lora_linear


@dataclass(frozen=True)
class Contestant:
    """`call` maps x (M, K) to y (M, N); `trainable` get gradients, `own` are there before the call."""

    call: Callable[[Tensor], Tensor]
    trainable: tuple[Tensor, ...] = ()
    own: tuple[Tensor, ...] = ()


class LayerBench:
    """The contestants of a layer's case on shared weights and inputs."""

    baseline = lineup.FROZEN

    def __init__(self, case: Case, extent: lineup.Extent = lineup.USUAL) -> None:
        self.case = case
        self.dtype, _ = data.dtypes(case)
        self.weight, bias = data.frozen_weight(case.K, case.N, self.dtype)
        self.bias = bias if case.bias else None
        self.adapter = data.adapter(case)
        self.inputs = data.inputs(case.M, case.K, self.dtype, seed=1)
        self.grads = data.inputs(case.M, case.N, self.dtype, seed=2) if case.trains else []
        self.contestants = {name: self._build(name) for name in lineup.contestants(case, extent)}

    def _build(self, name: str) -> Contestant:
        if name == lineup.FROZEN:
            return Contestant(self.frozen, (), self._frozen_tensors())
        if name.startswith("peft "):
            from bench.peers import compiled_layer, peft_layer

            layer = peft_layer(name, self)
            call: Callable[[Tensor], Tensor] = layer
            if name == lineup.COMPILED:
                layer, call = compiled_layer(layer, self.case)
            tensors = tuple(layer.parameters())
            return Contestant(call, tuple(p for p in tensors if p.requires_grad), tensors)
        source = self.adapter.half() if name == lineup.HALF_RANK else self.adapter
        adapter = source.copy(self.case.trains)
        dropout = 0.0 if name == lineup.NO_DROPOUT else self.case.dropout
        if name == lineup.EAGER:
            call = self._eager(adapter, dropout)
        else:
            call = self.fused(adapter, dropout, impl="eager" if name == lineup.FLOOR else "auto")
        return Contestant(call, adapter.trainable(), (*self._frozen_tensors(), *adapter.trainable()))

    def _frozen_tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def frozen(self, x: Tensor) -> Tensor:
        """The layer without an adapter."""
        return F.linear(x, self.weight, self.bias)

    def _eager(self, adapter: data.Adapter, dropout: float) -> Callable[[Tensor], Tensor]:
        """LoRA as its formula is typed into a model."""

        def call(x: Tensor) -> Tensor:
            dropped = F.dropout(x, dropout) if dropout else x
            delta = F.linear(F.linear(dropped.to(adapter.lora_A.dtype), adapter.lora_A), adapter.lora_B)
            return self.frozen(x) + (delta * data.SCALING).to(x.dtype)

        return call

    def fused(
        self, adapter: data.Adapter, dropout: float, impl: str = "auto", seed: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """`lora_linear` on this layer."""

        def call(x: Tensor) -> Tensor:
            return lora_linear(
                x,
                self.weight,
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

    def prepare(self, name: str) -> None:
        """Nothing to do before a turn."""

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` calls, on the inputs from number `first` on."""
        contestant, inputs = self.contestants[name], self.inputs
        call, count = contestant.call, len(inputs)
        if not self.case.trains:
            with torch.no_grad():
                for i in range(first, first + repeats):
                    call(inputs[i % count])
            return
        grads, trainable = self.grads, contestant.trainable
        for i in range(first, first + repeats):
            for parameter in trainable:
                parameter.grad = None
            call(inputs[i % count].detach().requires_grad_()).backward(grads[i % len(grads)])

    def saved_bytes(self, name: str) -> int | None:
        """Bytes kept for backward beside the parameters; None for a forward case."""
        if not self.case.trains:
            return None
        contestant = self.contestants[name]
        # A copy: the inputs are views of a pool, whose whole storage would count.
        x = self.inputs[0].clone().requires_grad_()
        return bytes_saved_for_backward(lambda: contestant.call(x), contestant.own)
