"""A frozen `torch.nn.Linear` with a low-rank adapter of fixed rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRALinear(AdapterLinear):
    """y = x·Wᵀ + bias + (lora_alpha/r) · drop(x)·Aᵀ·Bᵀ, with W and bias frozen.

    The factors have the base weight's dtype, or float32 where that is bfloat16 or float16, as in peft. `state_dict`
    uses the names of peft's files; loading also takes peft's in-memory names with one adapter's name inside
    ("lora_A.default.weight"), and unmerges first. While merged, `state_dict` gives the base weight without the
    adapter.

    Attributes:
        base_layer: the frozen `nn.Linear`, shared with whoever gave it: weight (N, K), bias (N,) or None.
        lora_A: its weight (r, K), drawn as HF peft does, from kaiming_uniform(a=√5).
        lora_B: its weight (N, r), zero at first.
        scaling: lora_alpha / r.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, *, impl: str = "auto"
    ) -> None:
        check_arguments(linear, r, 1, lora_alpha, lora_dropout, impl)
        super().__init__(linear, r, lora_alpha, lora_dropout, impl)
        self.scaling = lora_alpha / r
        like = {"device": linear.weight.device, "dtype": factor_dtype(linear)}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **like)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **like)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, *, impl: str = "auto"
    ) -> Self:
        """Wrap `linear`, which is frozen and shared, not copied.

        Args:
            linear: the base layer, weight (N, K).
            r: rank, at least 1.
            lora_alpha: the adapter is scaled by lora_alpha / r.
            lora_dropout: probability in [0, 1] with which elements of the adapter's input are dropped while training.
            impl: the implementation of `lora_linear`.

        Returns:
            The layer, in place of `linear`.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
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
            parameter(base, "weight"),
            parameter(modules["lora_A"], "weight"),
            parameter(modules["lora_B"], "weight"),
            bias=parameter(base, "bias"),
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            impl=self.impl,
        )

    def _active_factors(self) -> tuple[Tensor, Tensor]:
        return at_least_float32(self.lora_A.weight), at_least_float32(self.lora_B.weight)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        drop_adapter_name(state_dict, prefix, ("lora_A", "lora_B"), ".weight", errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
