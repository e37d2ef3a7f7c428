"""Drop-in layers: a frozen `torch.nn.Linear` with a low-rank adapter of fixed (LoRA) or masked (AdaLoRA) ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from typing_extensions import Self

from peftkernels._base_weight import BaseWeight
from peftkernels.backends.registry import IMPLEMENTATIONS
from peftkernels.functional import lora_linear
from peftkernels.ops.rank_plan import RankPlan, RankState

_PLAIN = (Tensor, nn.Parameter)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# AdaLoRALinear's scale where no lora_alpha is given: docs/learning-rate-and-scale.md has the reason and what it was
# measured on. HF peft's default alpha of 8 makes it 8/r.
DEFAULT_ADALORA_SCALE = 4


class _AdapterLinear(nn.Module):
    """What both layers share: the frozen base layer, merging, and checkpoints in HF peft's names."""

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
        """Whether the adapter is added into the base layer's weight at present."""
        return self._buffers["_frozen_weight"] is not None

    def _live_factors(self) -> tuple[Tensor, Tensor]:
        """Gated A (r', K) and B (N, r') of the ranks that contribute to the output."""
        raise NotImplementedError

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight: scaling · B·(gate ⊙ A) over the ACTIVE ranks, (N, K).

        Summed and returned in the factors' dtype, or in float32 for lower precisions.
        """
        gated_A, lora_B = self._live_factors()
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


class LoRALinear(_AdapterLinear):
    """y = x·Wᵀ + bias + (lora_alpha/r) · drop(x)·Aᵀ·Bᵀ, with W and bias frozen (LoRA, arXiv 2106.09685).

    base_layer      the frozen `nn.Linear`, shared with whoever gave it: weight (N, K), bias (N,) or None
    lora_A.weight   (r, K)  drawn as HF peft does, from kaiming_uniform(a=√5)
    lora_B.weight   (N, r)  zero
    scaling         lora_alpha / r

    The factors have the base weight's dtype, or float32 where that is bfloat16 or float16, as in peft. `state_dict`
    uses the names of peft's files; loading also takes peft's in-memory names with one adapter's name inside
    ("lora_A.default.weight"), and unmerges first. While merged, `state_dict` gives the base weight without the
    adapter.
    """

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, *, impl: str = "auto"
    ) -> None:
        _check_arguments(linear, r, 1, lora_alpha, lora_dropout, impl)
        super().__init__(linear, r, lora_alpha, lora_dropout, impl)
        self.scaling = lora_alpha / r
        like = {"device": linear.weight.device, "dtype": _factor_dtype(linear)}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **like)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **like)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, *, impl: str = "auto"
    ) -> Self:
        """Wrap `linear`, which is frozen and shared, not copied.

        r             rank, at least 1
        lora_alpha    the adapter is scaled by lora_alpha / r
        lora_dropout  probability in [0, 1] with which elements of the adapter's input are dropped while training
        impl          the implementation of `lora_linear`

        Raises TypeError or ValueError naming the argument, what was found and what was expected.
        """
        return cls(linear, r, lora_alpha, lora_dropout, impl=impl)

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero, which makes the adapter's contribution zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N), both in the base weight's dtype; see `lora_linear`."""
        if self.merged:
            return self.base_layer(x)
        modules = self._modules
        base = modules["base_layer"]
        return lora_linear(
            x,
            _parameter(base, "weight"),
            _parameter(modules["lora_A"], "weight"),
            _parameter(modules["lora_B"], "weight"),
            bias=_parameter(base, "bias"),
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            impl=self.impl,
        )

    def _live_factors(self) -> tuple[Tensor, Tensor]:
        return _at_least_float32(self.lora_A.weight), _at_least_float32(self.lora_B.weight)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        _drop_adapter_name(state_dict, prefix, ("lora_A", "lora_B"), ".weight", errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class AdaLoRALinear(_AdapterLinear):
    """y = x·Wᵀ + bias + s · ((drop(x)·Aᵀ) ⊙ ĝ)·Bᵀ, ĝ_i = lora_E_i where rank i is ACTIVE, else 0; W and bias frozen.

    base_layer   the frozen `nn.Linear`, shared with whoever gave it: weight (N, K), bias (N,) or None
    lora_A       (r, K)  drawn from N(0, 0.02²)
    lora_B       (N, r)  drawn from N(0, 0.02²)
    lora_E       (r, 1)  gate of each rank, zero at first
    rank_state   (r,)    uint8, one `RankState` per rank; `rank_plan` joins it with the order kernels walk
    scaling      s = σ/(r + 1e-5) with σ = lora_alpha where that is positive, else r; pruning does not change it.
                 Without a lora_alpha it is 4·r, so that s is 4 at any rank

    An allocator (`peftkernels.allocation`) writes the states in place; their shapes never change, so nothing is
    compiled anew. The factors have the base weight's dtype, or float32 where that is bfloat16 or float16, as in peft.
    `state_dict` uses the names of HF peft's files and adds rank_state; loading also takes peft's in-memory names with
    one adapter's name inside ("lora_A.default"), where rank_state is missing makes every rank ACTIVE, and unmerges
    first. While merged, `state_dict` gives the base weight without the adapter.

    Source: AdaLoRA (arXiv 2303.10512), eq. 3; scaling and initial values as in HF peft.
    """

    rank_state: Tensor
    rank_order: Tensor
    rank_counts: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        *,
        impl: str = "auto",
    ) -> None:
        _check_arguments(linear, r, 0, 0 if lora_alpha is None else lora_alpha, lora_dropout, impl)
        if lora_alpha is None:
            lora_alpha = DEFAULT_ADALORA_SCALE * r
        super().__init__(linear, r, lora_alpha, lora_dropout, impl)
        self.scaling = (lora_alpha if lora_alpha > 0 else float(r)) / (r + 1e-5)
        device, dtype = linear.weight.device, _factor_dtype(linear)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.lora_E = nn.Parameter(torch.empty(r, 1, device=device, dtype=dtype))
        plan = RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device))
        self.register_buffer("rank_state", plan.state)
        self.register_buffer("rank_order", plan.order, persistent=False)
        self.register_buffer("rank_counts", plan.counts, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        *,
        impl: str = "auto",
    ) -> Self:
        """Wrap `linear`, which is frozen and shared, not copied.

        r             rank at the start, at least 0
        lora_alpha    the adapter is scaled by lora_alpha / (r + 1e-5), or by r / (r + 1e-5) where it is not positive;
                      4·r when None. `peftkernels.allocation.from_lora` gives the one that belongs to LoRA's settings
        lora_dropout  probability in [0, 1] with which elements of the adapter's input are dropped while training
        impl          the implementation of `lora_linear`

        Raises TypeError or ValueError naming the argument, what was found and what was expected.
        """
        return cls(linear, r, lora_alpha, lora_dropout, impl=impl)

    @property
    def rank_plan(self) -> RankPlan:
        """The plan over this layer's own tensors: `rank_plan.update_(state)` changes the layer."""
        return _rank_plan(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B anew, set the gates to zero and every rank to ACTIVE."""
        nn.init.normal_(self.lora_A, mean=0.0, std=0.02)
        nn.init.normal_(self.lora_B, mean=0.0, std=0.02)
        nn.init.zeros_(self.lora_E)
        self.rank_plan.update_(torch.full_like(self.rank_state, int(RankState.ACTIVE)))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N), both in the base weight's dtype; see `lora_linear`."""
        if self.merged:
            return self.base_layer(x)
        base = self._modules["base_layer"]
        return lora_linear(
            x,
            _parameter(base, "weight"),
            _parameter(self, "lora_A"),
            _parameter(self, "lora_B"),
            bias=_parameter(base, "bias"),
            gate=_parameter(self, "lora_E"),
            # Not the property, which on a layer that borrows this forward may give another copy's RankPlan.
            rank_plan=_rank_plan(self),
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            impl=self.impl,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        state = self.rank_state
        # `to_empty` leaves whatever lies in memory: kernels would take it for ranks.
        if type(state) is Tensor and not state.is_meta and not self.rank_plan.is_consistent():
            self.rank_plan.update_(torch.full_like(state, int(RankState.ACTIVE)))
        return self

    def _live_factors(self) -> tuple[Tensor, Tensor]:
        active = self.rank_state == RankState.ACTIVE
        gated_A = _at_least_float32(self.lora_A[active]) * _at_least_float32(self.lora_E[active])
        return gated_A, _at_least_float32(self.lora_B[:, active])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        _drop_adapter_name(state_dict, prefix, ("lora_A", "lora_B", "lora_E", "ranknum"), "", errors)
        rank_number = state_dict.pop(prefix + "ranknum", None)
        if rank_number is not None and abs(float(rank_number) - self.r) > 0.5:
            errors.append(
                f'"{prefix}ranknum": found {float(rank_number):g}, expected {self.r}: the adapter was trained with '
                f"scaling lora_alpha/{float(rank_number):g} and resized, this layer scales by lora_alpha/{self.r}"
            )
        gates = state_dict.get(prefix + "lora_E")
        if gates is not None and prefix + "rank_state" not in state_dict:
            active = torch.full((gates.shape[0],), int(RankState.ACTIVE), dtype=torch.uint8, device=gates.device)
            state_dict[prefix + "rank_state"] = active
        states = state_dict.get(prefix + "rank_state")
        if states is not None and not states.is_meta and bool((states > RankState.ACTIVE).any()):
            errors.append(f'"{prefix}rank_state": found value {int(states.max())}, expected 0, 1 or 2 for each rank')
            del state_dict[prefix + "rank_state"]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.rank_order.device != self.rank_state.device:
            # Only with load_state_dict(assign=True), which replaces tensors of another device, "meta" for one.
            self.rank_order = torch.empty_like(self.rank_order, device=self.rank_state.device)
            self.rank_counts = torch.empty_like(self.rank_counts, device=self.rank_state.device)
        self.rank_plan.update_(self.rank_state)


def _check_arguments(linear: Any, r: Any, lowest_rank: int, lora_alpha: Any, lora_dropout: Any, impl: Any) -> None:
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
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: found {impl!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")


def _factor_dtype(linear: nn.Linear) -> torch.dtype:
    return torch.promote_types(linear.weight.dtype, torch.float32)


def _parameter(module: Any, name: str) -> Any:
    """`module.name` of a parameter, or of what stands in its place (a parametrization, a shard's view).

    `nn.Module` finds parameters in `__getattr__`, after looking everywhere else: a forward pass of a small layer would
    spend as long on that as on its kernel.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _rank_plan(module: Any) -> RankPlan:
    buffers = module._buffers
    return RankPlan._of_known(buffers["rank_state"], buffers["rank_order"], buffers["rank_counts"])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _save_frozen_weight(module: _AdapterLinear, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """A checkpoint of a merged layer holds the weight without the adapter, which it holds as well."""
    if module._frozen_weight is not None:
        state_dict[prefix + "base_layer.weight"] = module._frozen_weight.detach()


def _drop_adapter_name(state_dict: Any, prefix: str, names: Iterable[str], suffix: str, errors: list[str]) -> None:
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
