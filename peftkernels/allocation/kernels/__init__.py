"""What an allocator computes on the device of the layers: one contract, several implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftkernels.allocation.kernels.eager import EagerKernels
from peftkernels.allocation.kernels.layout import FactorLayout
from peftkernels.backends.cpu import allocation as cpu_allocation
from peftkernels.backends.triton import allocation as triton_allocation
from peftkernels.ops.rank_plan import RankPlan

IMPLEMENTATIONS = ("eager", "cpu", "triton")

__all__ = ["IMPLEMENTATIONS", "AllocationKernels", "FactorLayout", "kernels_for"]


class AllocationKernels(Protocol):
    """One device's implementation; `EagerKernels` says what every function means. None of them waits for the device.

    An object keeps working memory between calls and serves one allocator. Tensors of one call lie on one device.
    """

    name: str

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
        """I = |p·g|; Ī ← β1·Ī + (1-β1)·I; Ū ← β2·Ū + (1-β2)·|I - Ī|, in place, each operation rounded on its own.

        parameters    the factors in the layout's order and shapes, any float dtype and strides
        gradients     the same; None counts as zero
        sensitivity   Ī, flat as the layout says, float32 or float64: the dtype of all arithmetic
        uncertainty   Ū, likewise
        skip          0-dim bool tensor or None; True leaves both buffers as they are

        Returns a 0-dim bool tensor: whether every p·g was finite. Where one was not, both buffers stay unchanged.
        """
        ...

    def rank_scores(self, layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """S_i = s_E,i + (mean_j s_A,ij + mean_j s_B,ji) with s = Ī·Ū, (Σ r,), layers in model order.

        On the CPU equal to the bit to `torch.mean` over each factor by itself.
        """
        ...

    def select(self, scores: Tensor, budget: int | Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """`select_ranks`: the ranks to keep, bool (Σ r,), and the threshold, 0-dim.

        budget: an int, or a 0-dim int tensor on the device of the scores, which the host does not read.
        """
        ...

    def apply(
        self,
        layout: FactorLayout,
        keep: Tensor,
        gates: Sequence[Tensor],
        plans: Sequence[RankPlan],
        masked_state: int,
        mask_now: Tensor | None = None,
    ) -> None:
        """Zero in place the gates (r, 1) of ranks that are not kept, and write every plan's state, order and counts.

        keep: bool (Σ r,). Kept ranks become ACTIVE, the others `masked_state`, a RankState. mask_now: 0-dim bool tensor
        or None; where it is False the gates stay as they are and every rank becomes ACTIVE.
        """
        ...

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
        """w/(2n)·Σ(‖A·Aᵀ-I‖_F + ‖Bᵀ·B-I‖_F), 0-dim, and its gradients by every A, then by every B.

        keep       n bool tensors (r,) or None; where given, only the ranks that are kept take part
        add_to     tensors of the factors' shapes, A's then B's; where given, `scale` times the gradient, rounded to
                   their dtype, is added to them in place, and None is returned in place of gradients
        gradients  False: None is returned for them and they are not computed

        Sums, and gradients returned, are in the factors' dtype, in float32 for lower precisions.
        """
        ...


def kernels_for(device: torch.device, dtype: torch.dtype, impl: str = "auto") -> AllocationKernels:
    """The implementation for averages of `dtype` (float32 or float64) on `device`.

    impl: "auto" for the fastest that can serve, or a name of `IMPLEMENTATIONS`, which is served or refused. Raises
    ValueError for another name, and RuntimeError where the one that was named cannot serve, saying why.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl: found {impl!r}, expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    if impl in ("auto", "cpu"):
        reason = cpu_allocation.refusal(device, dtype)
        if reason is None:
            return cpu_allocation.CpuKernels(EagerKernels().select)
        if impl == "cpu":
            raise RuntimeError(f"impl='cpu' cannot run: {reason}")
    if impl == "triton" or (impl == "auto" and triton_allocation.disadvantage(device, dtype) is None):
        reason = triton_allocation.refusal(device, dtype)
        if reason is not None:
            raise RuntimeError(f"impl='triton' cannot run: {reason}")
        return triton_allocation.kernels()
    return EagerKernels()
