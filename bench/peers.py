"""HF peft's own layers on the weights of a case, with the same adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import peft
import torch
from torch import Tensor, nn

from bench import data, lineup
from bench.cases import Case

_ADAPTER = "default"


class Layer(Protocol):
    """A case with its frozen weight and its adapter."""

    case: Case
    bias: Tensor | None
    adapter: data.Adapter

    @property
    def weight(self) -> Tensor:
        """The frozen weight (N, K)."""


class _Base(nn.Module):
    """What peft wraps: a module whose only linear layer is the frozen one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def peft_layer(name: str, bench: Layer) -> nn.Module:
    """The layer that `peft.get_peft_model` puts in the place of the frozen one; it is called directly.

    Names with "bf16 factors" are made with `autocast_adapter_dtype=False`, the others as peft does by default.
    AdaLoRA's `ranknum` is kept a constant, which peft 0.21 else trains on bases that are not float32.
    """
    case = bench.case
    linear = frozen_linear(bench.weight, bench.bias)
    adalora = name.startswith(lineup.PEFT_ADALORA)
    shared: dict[str, Any] = {"target_modules": ["linear"], "lora_dropout": case.dropout}
    if adalora:
        config: peft.PeftConfig = peft.AdaLoraConfig(
            init_r=case.r, target_r=1, total_step=1000, lora_alpha=data.SCALING * (case.r + 1e-5), **shared
        )
    else:
        config = peft.LoraConfig(r=case.r, lora_alpha=data.SCALING * case.r, **shared)
    own_dtype = name in (lineup.PEFT_LORA_BF16, lineup.PEFT_ADALORA_BF16)
    with warnings.catch_warnings():
        # It warns where target_r is not below init_r and about a model without a configuration: neither matters here.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_Base(linear), config, autocast_adapter_dtype=not own_dtype)
    layer: Any = model.base_model.model.linear
    with torch.no_grad():
        if adalora:
            layer.lora_A[_ADAPTER].copy_(bench.adapter.lora_A)
            layer.lora_B[_ADAPTER].copy_(bench.adapter.lora_B)
            gate = torch.ones(case.r) if bench.adapter.gate is None else bench.adapter.masked_gate()
            layer.lora_E[_ADAPTER].copy_(gate.unsqueeze(1))
            layer.ranknum[_ADAPTER].requires_grad_(False)
        else:
            layer.lora_A[_ADAPTER].weight.copy_(bench.adapter.lora_A)
            layer.lora_B[_ADAPTER].weight.copy_(bench.adapter.lora_B)
    if not case.trains:
        layer.requires_grad_(False)
    module: nn.Module = layer.train()
    return module


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` on these very tensors."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


_compiled: tuple[tuple[object, ...], nn.Module, Callable[[Tensor], Tensor]] | None = None


def compiled_layer(layer: nn.Module, case: Case) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """`torch.compile(layer)` for any number of rows, and the layer it belongs to.

    From case to case it is kept while only the number of rows changes; the layer is then the first such case's, which
    has the same values.
    """
    global _compiled
    key = (case.direction, case.K, case.N, case.r, case.dtype, case.dropout, case.bias)
    if _compiled is None or _compiled[0] != key:
        import torch._dynamo
        import torch._inductor.config

        # Workers of its own would compete with what is timed next; falling back to eager would be timed as compiled.
        torch._inductor.config.compile_threads = 1
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.reset()
        _compiled = key, layer, torch.compile(layer, dynamic=True)
    return _compiled[1], _compiled[2]
