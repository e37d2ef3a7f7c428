"""The allocation kernels in C++ (csrc/cpu/allocation/)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels.ops import allocation  # noqa: F401  (declares the operators)
from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.rank_plan import RankPlan
from peftkernels.ops.selection import select_ranks

_OPERATORS: Any = torch.ops.peftkernels


class _Scores:
    """Scores, and the very tensors that they were made of, none of them written since."""

    def __init__(self, scores: Tensor, *made_of: Tensor) -> None:
        self.scores = scores
        self._made_of = [(weakref.ref(tensor), tensor._version) for tensor in made_of]

    def were_made_of(self, *tensors: Tensor) -> bool:
        pairs = zip(self._made_of, tensors, strict=True)
        return all(one() is tensor and version == tensor._version for (one, version), tensor in pairs)


class CpuKernels:
    """`AllocationKernels` says what each function takes and returns; `select` is the tensor code of all backends.

    Where scores were asked for after the last update, the next one takes them along while the averages are in cache.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._layout: FactorLayout | None = None
        self._table = torch.empty(0, 3, dtype=torch.int64)
        self._scores_wanted = False
        self._scores: _Scores | None = None

    def _table_of(self, layout: FactorLayout) -> Tensor:
        if self._layout is not layout:
            rows = [(offset, *shape) for offset, shape in zip(layout.offsets, layout.shapes, strict=True)]
            self._table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
            self._layout = layout
        return self._table

    @torch.no_grad()
    def update_averages(
        self,
        layout: FactorLayout,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        sensitivity: Tensor,
        uncertainty: Tensor,
        beta1: float,
        beta2: float,
        skip: Tensor | None = None,
    ) -> Tensor:
        table = self._table_of(layout)
        take_scores = self._scores_wanted and not sensitivity.is_inference()
        finite, scores = _OPERATORS.allocation_averages.cpu(
            parameters, gradients, table, sensitivity, uncertainty, beta1, beta2, skip, take_scores
        )
        self._scores_wanted = False
        if scores.numel():
            self._scores = _Scores(scores, table, sensitivity, uncertainty)
        return finite

    @torch.no_grad()
    def rank_scores(self, layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        table = self._table_of(layout)
        self._scores_wanted = True
        kept = self._scores
        if kept is not None and not sensitivity.is_inference() and kept.were_made_of(table, sensitivity, uncertainty):
            return kept.scores.clone()
        return _OPERATORS.allocation_scores.cpu(table, sensitivity, uncertainty)

    def select(self, scores: Tensor, budget: int | Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        return select_ranks(scores, budget, exact=exact)

    @torch.no_grad()
    def apply(
        self,
        layout: FactorLayout,
        keep: Tensor,
        gates: Sequence[Tensor],
        plans: Sequence[RankPlan],
        masked_state: int,
        mask_now: Tensor | None = None,
    ) -> None:
        states = [plan.state for plan in plans]
        orders = [plan.order for plan in plans]
        counts = [plan.counts for plan in plans]
        _OPERATORS.allocation_mask.cpu(keep, mask_now, gates, states, orders, counts, int(masked_state))

    @torch.no_grad()
    def orthogonality(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        weight: float,
        keep: Sequence[Tensor] | None = None,
        add_to: Sequence[Tensor] | None = None,
        scale: float = 1.0,
        gradients: bool = True,
    ) -> tuple[Tensor, list[Tensor] | None]:
        term, computed = _OPERATORS.allocation_orthogonality.cpu(
            lora_A, lora_B, weight, keep or (), add_to or (), scale, gradients and add_to is None
        )
        return term, computed if gradients and add_to is None else None
