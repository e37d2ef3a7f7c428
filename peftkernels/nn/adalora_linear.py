"""A frozen `torch.nn.Linear` with a low-rank adapter whose ranks have gates and can be masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkernels.functional import lora_linear
from peftkernels.nn.adapter_linear import (
    AdapterLinear,
    at_least_float32,
    check_arguments,
    drop_adapter_name,
    factor_dtype,
    parameter,
)
from peftkernels.ops.rank_plan import RankPlan, RankState

if TYPE_CHECKING:
    from typing_extensions import Self

# AdaLoRALinear's scale where no lora_alpha is given: docs/learning-rate-and-scale.md has the reason and what it was
# measured on. HF peft's default alpha of 8 makes it 8/r.
DEFAULT_ADALORA_SCALE = 4


class AdaLoRALinear(AdapterLinear):
    """y = x·Wᵀ + bias + s · ((drop(x)·Aᵀ) ⊙ ĝ)·Bᵀ, ĝ_i = lora_E_i where rank i is ACTIVE, else 0; W and bias frozen.

    An allocator (`peftkernels.allocation`) writes the states in place; their shapes never change, so nothing is
    compiled anew. The factors have the base weight's dtype, or float32 where that is bfloat16 or float16, as in peft.
    `state_dict` uses the names of HF peft's files and adds rank_state; loading also takes peft's in-memory names with
    one adapter's name inside ("lora_A.default"), where rank_state is missing makes every rank ACTIVE, and unmerges
    first. While merged, `state_dict` gives the base weight without the adapter.

    Attributes:
        base_layer: the frozen `nn.Linear`, shared with whoever gave it: weight (N, K), bias (N,) or None.
        lora_A: (r, K), drawn from N(0, 0.02²).
        lora_B: (N, r), drawn from N(0, 0.02²).
        lora_E: (r, 1), the gate of each rank, zero at first.
        rank_state: (r,) uint8, one `RankState` per rank; `rank_plan` joins it with the order that kernels walk.
        scaling: s = σ/(r + 1e-5) with σ = lora_alpha where that is positive, else r; pruning does not change it.
            Without a lora_alpha it is 4·r, so that s is 4 at any rank.

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
        check_arguments(linear, r, 0, 0 if lora_alpha is None else lora_alpha, lora_dropout, impl)
        if lora_alpha is None:
            lora_alpha = DEFAULT_ADALORA_SCALE * r
        super().__init__(linear, r, lora_alpha, lora_dropout, impl)
        self.scaling = (lora_alpha if lora_alpha > 0 else float(r)) / (r + 1e-5)
        device, dtype = linear.weight.device, factor_dtype(linear)
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

        Args:
            linear: the base layer, weight (N, K).
            r: rank at the start, at least 0.
            lora_alpha: the adapter is scaled by lora_alpha / (r + 1e-5), or by r / (r + 1e-5) where it is not positive;
                4·r when None. `peftkernels.allocation.from_lora` gives the one that belongs to LoRA's settings.
            lora_dropout: probability in [0, 1] with which elements of the adapter's input are dropped while training.
            impl: the implementation of `lora_linear`.

        Returns:
            The layer, in place of `linear`.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
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
            parameter(base, "weight"),
            parameter(self, "lora_A"),
            parameter(self, "lora_B"),
            bias=parameter(base, "bias"),
            gate=parameter(self, "lora_E"),
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

    def _active_factors(self) -> tuple[Tensor, Tensor]:
        active = self.rank_state == RankState.ACTIVE
        gated_A = at_least_float32(self.lora_A[active]) * at_least_float32(self.lora_E[active])
        return gated_A, at_least_float32(self.lora_B[:, active])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        drop_adapter_name(state_dict, prefix, ("lora_A", "lora_B", "lora_E", "ranknum"), "", errors)
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


def _rank_plan(module: Any) -> RankPlan:
    buffers = module._buffers
    return RankPlan._of_known(buffers["rank_state"], buffers["rank_order"], buffers["rank_counts"])
