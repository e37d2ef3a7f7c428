"""The part that the layers with an adapter share: a frozen base layer, merging, and checkpoints in HF peft's names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from peftkernels.backends.registry import check_name
from peftkernels.nn.base_weight import BaseWeight

_PLAIN = (Tensor, nn.Parameter)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AdapterLinear(nn.Module):
    """The part that both layers share: the frozen base layer, merging, and checkpoints in HF peft's names."""

    _frozen_weight: Tensor | None
    scaling: float

    def __init__(self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, impl: str) -> None:
        super().__init__()
        self.base_layer = linear.requires_grad_(False)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.impl = impl
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.register_state_dict_post_hook(_save_frozen_weight)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (N, K), for code that asks a linear layer for its dtype or device.

        While the adapter is not merged into it, a product with it raises RuntimeError: it would leave the adapter out,
        as `nn.MultiheadAttention` does with its `out_proj`. `base_layer.weight` is the parameter itself.
        """
        weight = self.base_layer.weight
        # A weight of a class of its own, as FSDP2 shards it, answers for itself.
        return weight if self.merged or type(weight) not in _PLAIN else weight.as_subclass(BaseWeight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (N,), or None."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """True while the adapter is added into the base layer's weight."""
        return self._buffers["_frozen_weight"] is not None

    def _active_factors(self) -> tuple[Tensor, Tensor]:
        """Gated A (r', K) and B (N, r') of the ACTIVE ranks."""
        raise NotImplementedError

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight: scaling · B·(gate ⊙ A) over the ACTIVE ranks.

        Returns:
            (N, K), summed in the factors' dtype, or in float32 for lower precisions.
        """
        gated_A, lora_B = self._active_factors()
        return (lora_B @ gated_A).mul_(self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter into the base layer's weight, rounded once to its dtype; forward is then the plain linear.

        A copy of the weight as it was is kept for `unmerge`: N·K elements until then. Later changes of gates or
        masks have no effect while merged. Warns and does nothing when merged already.
        """
        if self.merged:
            warnings.warn("the adapter is merged already, nothing to do", UserWarning, stacklevel=2)
            return
        weight = self.base_layer.weight
        delta = self.delta_weight()
        self._frozen_weight = weight.detach().clone()
        weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight to the bits it had before `merge`. Warns and does nothing when not merged."""
        if self._frozen_weight is None:
            warnings.warn("the adapter is not merged, nothing to do", UserWarning, stacklevel=2)
            return
        self.base_layer.weight.copy_(self._frozen_weight)
        self._frozen_weight = None

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        # A checkpoint holds the weight without the adapter, so that is what the layer must hold when it is filled.
        if self.merged:
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, impl={self.impl!r}"
        )
        return text + ", merged" if self.merged else text


def check_arguments(linear: Any, r: Any, lowest_rank: int, lora_alpha: Any, lora_dropout: Any, impl: Any) -> None:
    """Raise TypeError or ValueError naming the argument of a layer that cannot be used."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: found {type(linear).__name__}, expected a torch.nn.Linear")
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise TypeError(
            f"linear: found {type(linear).__name__} with a forward of its own, expected the forward of torch.nn.Linear"
        )
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"linear: found a {type(linear).__name__}, as nn.MultiheadAttention has in out_proj: it reads the weight "
            "and never calls the layer, so that an adapter would do nothing; expected a layer that is called"
        )
    if parametrize.is_parametrized(linear):
        raise ValueError("linear: found a parametrized weight or bias, expected plain parameters")
    if linear._forward_hooks or linear._forward_pre_hooks:
        raise ValueError("linear: found forward hooks, which would not run, expected none")
    dtype = linear.weight.dtype
    if dtype not in _WEIGHT_DTYPES:
        raise TypeError(f"linear: found weight dtype {dtype}, expected float32, bfloat16, float16 or float64")
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r: found {r!r} ({type(r).__name__}), expected an int")
    if r < lowest_rank:
        raise ValueError(f"r: found {r}, expected at least {lowest_rank}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a number")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: found {lora_alpha}, expected a finite number")
    if not 0.0 <= lora_dropout <= 1.0:
        raise ValueError(f"lora_dropout: found {lora_dropout}, expected a probability in [0, 1]")
    check_name(impl)


def factor_dtype(linear: nn.Linear) -> torch.dtype:
    """The base weight's dtype, or float32 where that is lower."""
    return torch.promote_types(linear.weight.dtype, torch.float32)


def parameter(module: Any, name: str) -> Any:
    """`module.name` of a parameter, or of what stands in its place (a parametrization, a shard's view).

    `nn.Module` finds parameters in `__getattr__`, after looking everywhere else: a forward pass of a small layer would
    spend as long on that as on its kernel.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor without its gradient, in float32 where its dtype is lower."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _save_frozen_weight(module: AdapterLinear, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """A checkpoint of a merged layer holds the weight without the adapter, which it holds as well."""
    if module._frozen_weight is not None:
        state_dict[prefix + "base_layer.weight"] = module._frozen_weight.detach()


def drop_adapter_name(state_dict: Any, prefix: str, names: Iterable[str], suffix: str, errors: list[str]) -> None:
    """Rename "<prefix><name>.<adapter><suffix>" to "<prefix><name><suffix>", if that is one adapter's."""
    renamed: dict[str, str] = {}
    adapters = set()
    for name in names:
        start, own = f"{prefix}{name}.", f"{prefix}{name}{suffix}"
        for key in state_dict:
            adapter = key[len(start) :].removesuffix(suffix)
            if key != own and key.startswith(start) and key.endswith(suffix) and "." not in adapter:
                renamed[key] = own
                adapters.add(adapter)
    if len(adapters) > 1:
        errors.append(f'"{prefix}": found the adapters {", ".join(sorted(adapters))}, expected the names of one')
        return
    for key, own in renamed.items():
        state_dict[own] = state_dict.pop(key)
