"""What a backend offers to an allocator: the contract of every implementation of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.rank_plan import RankPlan


class AllocationKernels(Protocol):
    """One implementation of what an allocator computes on its layers' device, without waiting for the device.

    `peftkernels.backends.eager.allocation` is the one in tensor code that the others must equal. An object keeps
    working memory between calls and serves one allocator. Tensors of one call lie on one device.

    Attributes:
        name: The implementation's name: what `impl` is called by.
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
        """Update the smoothed sensitivity and uncertainty of every weight, in place.

            I = |p·g|;  Ī ← β1·Ī + (1-β1)·I;  Ū ← β2·Ū + (1-β2)·|I - Ī|     each operation rounded on its own

        Args:
            layout: Where each factor lies in the flat buffers.
            parameters: The factors p in the layout's order and shapes, of any float dtype and strides.
            gradients: Their gradients g, likewise; None counts as zero.
            sensitivity: Ī, flat as the layout says, float32 or float64: the dtype of all arithmetic.
            uncertainty: Ū, likewise.
            beta1: β1, between 0 and 1.
            beta2: β2, between 0 and 1.
            skip: 0-dim bool tensor or None; True leaves both buffers as they are.

        Returns:
            A 0-dim bool tensor, True if every p·g was finite. Where one was not, both buffers stay unchanged.
        """
        ...

    def rank_scores(self, layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """Reduce the averages to one score per rank.

            S_i = s_E,i + (mean_j s_A,ij + mean_j s_B,ji)     with s = Ī·Ū

        Args:
            layout: Where each factor lies in the flat buffers.
            sensitivity: Ī, as `update_averages` has it.
            uncertainty: Ū, likewise.

        Returns:
            S (Σ r,), layers in model order; on the CPU equal to the bit to `torch.mean` over each factor by itself.
        """
        ...

    def select(self, scores: Tensor, budget: int | Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Choose the ranks that a budget keeps, as `peftkernels.ops.selection.select_ranks` does.

        Args:
            scores: One per rank, (Σ r,).
            budget: How many ranks stay: an int, or a 0-dim int tensor on the device of the scores, which the host does
                not read.
            exact: False masks all ranks that tie at the threshold; True keeps exactly `budget` ranks.

        Returns:
            The ranks to keep, bool (Σ r,), and the threshold, 0-dim.
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
        """Zero in place the gates of ranks that are not kept, and write every plan's state, order and counts.

        Args:
            layout: The ranks of each layer.
            keep: bool (Σ r,). Kept ranks become ACTIVE, the others `masked_state`.
            gates: lora_E (r, 1) of every layer.
            plans: The rank plan of every layer.
            masked_state: A `RankState`.
            mask_now: 0-dim bool tensor or None; where it is False the gates stay as they are and every rank becomes
                ACTIVE.
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
        """Compute the orthogonality term w/(2n)·Σ(‖A·Aᵀ-I‖_F + ‖Bᵀ·B-I‖_F) over n adapters, and its gradients.

        Sums, and gradients returned, are in the factors' dtype, in float32 for lower precisions.

        Args:
            lora_A: n tensors (r, K).
            lora_B: n tensors (N, r).
            weight: w.
            keep: n bool tensors (r,) or None; where given, only the ranks that are kept take part.
            add_to: Tensors of the factors' shapes, A's then B's; where given, `scale` times the gradient, rounded to
                their dtype, is added to them in place, and None is returned in place of gradients.
            scale: What gradients added to `add_to` are multiplied by.
            gradients: False returns None for them and does not compute them.

        Returns:
            The term, 0-dim, and its gradients by every A, then by every B.
        """
        ...
