"""How far a training has moved its adapters: the sizes of their factors, of ΔW and of what ΔW does to the outputs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from demo.batches import Batch
from demo.runs import Run
from peftkernels.allocation.run.orthogonality import orthogonality
from peftkernels.nn import AdaLoRALinear, LoRALinear

Layer = LoRALinear | AdaLoRALinear


def adapter_layers(model: nn.Module) -> dict[str, Layer]:
    """The adapted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | AdaLoRALinear)}


def factors(layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (r, K), B (N, r) and the gates (r, 1), None where there are none; detached."""
    if isinstance(layer, AdaLoRALinear):
        return layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_E.detach()
    return layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), None


def delta_norm(layer: Layer) -> float:
    """‖ΔW‖_F = scaling · ‖B·diag(E)·A‖_F from the factors' Gram matrices, without forming ΔW."""
    A, B, gates = factors(layer)
    gated = A.double() if gates is None else A.double() * gates.double()
    square = ((gated @ gated.T) * (B.double().T @ B.double())).sum()
    return layer.scaling * float(square.clamp(min=0).sqrt())


class Growth:
    """Measures one run as it trains; made before its first step.

    Numbers are medians over the adapted layers:

    - A, B, E: root mean square of the factors' entries (E over gates that are not zero).
    - moved_A, moved_B: root mean square of the distance of A's and B's entries from where they began.
    - delta: ‖ΔW‖_F.
    - relative: ‖ΔW‖_F / ‖W‖_F.
    - outputs: ‖ΔW·x‖ / ‖W·x‖ over the tokens of one batch, x being the layer's own input.

    and `embedding`, ‖h - h0‖/‖h0‖ of the pooled output h on that batch, h0 that of the model without adapters.
    """

    def __init__(self, run: Run, batch: Batch) -> None:
        self._run = run
        self._batch = batch
        self._layers = adapter_layers(run.classifier)
        self._initial = {name: tuple(f.clone() for f in factors(layer)[:2]) for name, layer in self._layers.items()}
        # ΔW is zero before the first step, so this is what the model gives without adapters.
        self._embedding, _ = self._forward()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of the class's docstring, now."""
        embedding, outputs = self._forward()
        shift = (embedding - self._embedding).norm() / self._embedding.norm()
        found: dict[str, list[float]] = {"outputs": outputs}
        for name, layer in self._layers.items():
            A, B, gates = factors(layer)
            first_A, first_B = self._initial[name]
            delta = delta_norm(layer)
            values = {
                "A": _rms(A),
                "B": _rms(B),
                "moved_A": _rms(A - first_A),
                "moved_B": _rms(B - first_B),
                "delta": delta,
                "relative": delta / float(layer.base_layer.weight.norm()),
            }
            if gates is not None:
                live = gates[gates != 0]
                values["E"] = _rms(live) if live.numel() else 0.0
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        return {**{key: statistics.median(values) for key, values in found.items()}, "embedding": float(shift)}

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, list[float]]:
        """The pooled output on the batch, and for every layer how much of its output is ΔW's."""
        shares: list[float] = []
        own = self._batch.attention_mask.bool()

        def compare(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            base = nn.functional.linear(arguments[0], layer.base_layer.weight)
            bias = layer.base_layer.bias
            change = output - base if bias is None else output - base - bias
            shares.append(float(change[own].norm() / base[own].norm()))

        pooled: list[Tensor] = []
        handles = [layer.register_forward_hook(compare) for layer in self._layers.values()]
        handles.append(self._run.classifier.head.register_forward_pre_hook(lambda _, given: pooled.append(given[0])))
        try:
            self._run.model(input_ids=self._batch.input_ids, attention_mask=self._batch.attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        return pooled[0], shares


@contextmanager
def orthogonality_shares(run: Run, weight: float, shares: list[dict[str, float]]) -> Iterator[None]:
    """At every `optimizer.step()` inside, append ‖gradient of the orthogonality term‖ / ‖gradient of the task loss‖
    of all A and of all B, as {"A": …, "B": …}, to `shares`; to be entered where p.grad holds the sum of the two."""
    layers = [layer for layer in adapter_layers(run.classifier).values() if isinstance(layer, AdaLoRALinear)]

    def compare(optimizer: Any, args: Any, kwargs: Any) -> None:
        A, B = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
        with torch.enable_grad():
            own = torch.autograd.grad(orthogonality(A, B, weight), [*A, *B])
        found = {}
        for name, parameters, gradients in (("A", A, own[: len(A)]), ("B", B, own[len(A) :])):
            pairs = list(zip(parameters, gradients, strict=True))
            task = sum(float((p.grad - g).square().sum()) for p, g in pairs if p.grad is not None)
            term = sum(float(g.square().sum()) for g in gradients)
            found[name] = (term / task) ** 0.5 if task > 0 else float("inf")
        shares.append(found)

    handle = run.optimizer.register_step_pre_hook(compare)
    try:
        yield
    finally:
        handle.remove()


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
