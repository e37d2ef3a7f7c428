"""The allocator's computations on CUDA devices: what `AllocationKernels` asks for, as launches of Triton kernels.

Launches, for layers of one dtype: `update_averages` 3 (the flag set, the check, the pass), `rank_scores` 1 after an
update of the same averages and 2 otherwise, `select` 1, `apply` 1, `orthogonality` 2; copies of tensors that are not
contiguous come on top. Nothing waits for the device, and nothing is read back. Tables of addresses go to the device
when tensors have moved, and at the first call; a CUDA graph can be captured once they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from peftkernels.backends.triton.allocation import masks, threshold
from peftkernels.backends.triton.allocation.addresses import Addresses, Tensors, capturing, sent
from peftkernels.backends.triton.allocation.smoothing import Smoothing
from peftkernels.backends.triton.allocation.term import Term
from peftkernels.backends.triton.common.operands import device_guard
from peftkernels.ops.rank_plan import RankPlan, RankState

if TYPE_CHECKING:
    from peftkernels.ops.factor_layout import FactorLayout

_FEWEST_RANKS = 16


class TritonKernels:
    """`AllocationKernels` says what each function takes and returns; averages and scores are float32."""

    name = "triton"

    def __init__(self) -> None:
        self._smoothing: Smoothing | None = None
        self._term = Term()
        self._written = Addresses("lora_E and the tensors of rank plans", self._take_layers)
        self._layout: FactorLayout | None = None
        self._layers = torch.empty(0, dtype=torch.int64)

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
        with device_guard(sensitivity):
            smoothing = self._smoothing_of(layout, sensitivity)
            return smoothing.update(parameters, gradients, sensitivity, uncertainty, beta1, beta2, skip)

    def rank_scores(self, layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        with device_guard(sensitivity):
            return self._smoothing_of(layout, sensitivity).scores(sensitivity, uncertainty)

    def _smoothing_of(self, layout: FactorLayout, average: Tensor) -> Smoothing:
        smoothing = self._smoothing
        if smoothing is None or not smoothing.serves(layout, average.device):
            smoothing = self._smoothing = Smoothing(layout, average.device)
        return smoothing

    def select(self, scores: Tensor, budget: int | Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        if scores.dtype is not torch.float32 or scores.dim() != 1:
            raise TypeError(f"scores: found {scores.dtype} {tuple(scores.shape)}, expected float32 (sum of r,)")
        count = scores.numel()
        on_device, number = None, 0
        if isinstance(budget, Tensor):
            on_device = budget if budget.dtype in (torch.int32, torch.int64) else budget.to(torch.int64)
        else:
            number = min(max(budget, 0), count)
        with device_guard(scores):
            keep = torch.empty(count, dtype=torch.bool, device=scores.device)
            limit = torch.empty((), dtype=torch.float32, device=scores.device)
            variant = threshold.variant(exact, None if on_device is None else on_device.dtype)
            variant(1, scores.contiguous(), on_device, keep.view(torch.uint8), limit, number, count)
        return keep, limit

    def apply(
        self,
        layout: FactorLayout,
        keep: Tensor,
        gates: Sequence[Tensor],
        plans: Sequence[RankPlan],
        masked_state: int,
        mask_now: Tensor | None = None,
    ) -> None:
        count, recording = len(layout.ranks), capturing(keep.device)
        if not count:
            return
        written = [
            *gates,
            *[plan.state for plan in plans],
            *[plan.order for plan in plans],
            *[plan.counts for plan in plans],
        ]
        if layout is not self._layout:
            self._layout = layout
            self._written.forget()
        with torch.no_grad(), device_guard(keep):
            self._written.update(written, keep.device, recording)
            most = triton.next_power_of_2(max(*layout.ranks, _FEWEST_RANKS))
            masks.variant(most, mask_now is not None, int(RankState.ACTIVE))(
                count,
                self._layers,
                self._written.table,
                keep.contiguous().view(torch.uint8),
                None if mask_now is None else mask_now.view(torch.uint8),
                count,
                int(masked_state),
            )
            self._written.write_back(written)
        torch.autograd.graph.increment_version(written)

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
        with torch.no_grad(), device_guard(lora_A[0]):
            return self._term.compute(lora_A, lora_B, weight, keep, add_to, scale, gradients)

    def _take_layers(self, tensors: Tensors) -> None:
        """Check gates, states, orders and counts, and write the table of layers that `write_masks` reads."""
        layout = self._layout
        assert layout is not None
        layers = len(layout.ranks)
        if len(tensors) != 4 * layers:
            raise ValueError(
                f"gates, plans: found {len(tensors)} tensors in all, expected 4 for each of {layers} layers"
            )
        gates = []
        for layer, r in enumerate(layout.ranks):
            gate, state, order, counts = found = tensors[layer::layers]
            if gate is None or state is None or order is None or counts is None:
                raise TypeError(f"layer {layer}: found {found}, expected a gate and the tensors of a plan")
            if gate.numel() != r or state.shape != (r,) or order.shape != (r,) or counts.shape != (2,):
                raise ValueError(
                    f"layer {layer}: found a gate of {gate.numel()} numbers and a plan of {state.numel()} ranks, "
                    f"expected {r} as in the layout"
                )
            dtypes = (state.dtype, order.dtype, counts.dtype)
            if dtypes != (torch.uint8, torch.int32, torch.int32):
                raise TypeError(
                    f"layer {layer}: found a plan of {', '.join(map(str, dtypes))}, expected uint8, int32, int32"
                )
            gates.append(gate)
        rows = [
            (first, r, gate.element_size() // 2, 0)
            for first, r, gate in zip(layout.rank_offsets, layout.ranks, gates, strict=True)
        ]
        self._layers = sent(torch.tensor(rows, dtype=torch.int64), gates[0].device)
