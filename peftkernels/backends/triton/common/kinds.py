"""What a kernel is compiled for besides its tile: dtypes, which optional operands there are, and their alignment."""

from __future__ import annotations

from typing import NamedTuple

import torch

from peftkernels.ops.schemas import rank_dtype

_SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Kinds(NamedTuple):
    """The call as the compiler sees it; no sizes and no values.

    Attributes:
        x: The dtype of x, the frozen weight and the bias: the dtype of computation.
        factor: The dtype of A and B.
        gate: The dtype of the gate; None without.
        scaling: The dtype of a scaling tensor; None for a number.
        plan: True if there is a rank plan.
        dropout: True if elements are dropped.
        bias: True if there is a bias.
        aligned: True if rows of x, G, W, A and B start at multiples of 16 bytes, and N and K are multiples of 16.
        even_rank: True if r is a multiple of 16.
        whole: True if K is a multiple of 4, so that four neighbours share a Philox block.
        precision: How fp32 products are taken: "ieee", or "tf32" where the user allowed it; see `rank_precision`.
        pdl: True if launches overlap (compute capability 9.0 and later).
    """

    x: torch.dtype
    factor: torch.dtype
    gate: torch.dtype | None = None
    scaling: torch.dtype | None = None
    plan: bool = False
    dropout: bool = False
    bias: bool = False
    aligned: bool = True
    even_rank: bool = True
    whole: bool = True
    precision: str = "ieee"
    pdl: bool = False

    def aligned_names(self, own: tuple[str, ...], of_call: tuple[str, ...]) -> tuple[str, ...]:
        """Return the arguments that are multiples of 16: `own` always, those that a call brings where it is aligned."""
        if not self.aligned:
            return own
        return (*own, *of_call, "r") if self.even_rank else (*own, *of_call)

    @property
    def rank(self) -> torch.dtype:
        """The dtype of S and H, and of the factors beside them."""
        return rank_dtype(self.x)

    @property
    def rank_precision(self) -> str:
        """How products with a rank are taken: see `ranks.as_operand` for float16."""
        return "tf32" if self.x is torch.float16 else self.precision

    @property
    def label(self) -> str:
        """For the names of compiled kernels: "bf16, fp32 factors, plan"."""
        parts = [_SHORT[self.x]]
        if self.factor is not self.x:
            parts.append(f"{_SHORT[self.factor]} factors")
        optional = ("plan", "dropout", "bias", "pdl")
        parts += [name for name in optional if getattr(self, name)]
        parts += [f"{name} {_SHORT[kind]}" for name, kind in (("gate", self.gate), ("scaling", self.scaling)) if kind]
        parts += [
            word
            for word, flag in (
                ("unaligned", not self.aligned),
                ("odd rank", not self.even_rank),
                ("ragged", not self.whole),
            )
            if flag
        ]
        return ", ".join([*parts, self.precision] if self.x is torch.float32 else parts)
