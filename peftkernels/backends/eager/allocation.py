"""Every allocation kernel in plain tensor code, on any device: what the others must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkernels.backends.eager.plans import update_plans, zero_gates
from peftkernels.ops.factor_layout import FACTORS_PER_LAYER, FactorLayout
from peftkernels.ops.rank_plan import RankPlan, RankState
from peftkernels.ops.selection import select_ranks


class EagerKernels:
    """`AllocationKernels` says what each function takes and returns."""

    name = "eager"

    def __init__(self) -> None:
        self._importance: Tensor | None = None
        self._scratch: Tensor | None = None

    def _working_memory(self, average: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors like `average`, zero where no factor lies; kept, since they are as large as the averages."""
        importance, scratch = self._importance, self._scratch
        if importance is None or scratch is None or not _alike(importance, average):
            importance, scratch = torch.zeros_like(average), torch.zeros_like(average)
            self._importance, self._scratch = importance, scratch
        return importance, scratch

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
        importance, scratch = self._working_memory(sensitivity)
        if importance.numel() == 0:
            return torch.ones((), dtype=torch.bool, device=sensitivity.device)
        dense = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        torch._foreach_copy_(layout.views(importance), list(parameters))
        torch._foreach_copy_(layout.views(scratch), dense)
        importance.mul_(scratch).abs_()
        finite = torch.isfinite(importance.amax())
        taken = finite if skip is None else finite & ~skip
        # The host reads CPU tensors for free and can leave early; elsewhere the choice is made on the device.
        on_device = None if taken.device.type == "cpu" else taken
        if on_device is not None or taken:
            smooth(sensitivity, importance, beta1, scratch, on_device)
            smooth(uncertainty, importance.sub_(sensitivity).abs_(), beta2, scratch, on_device)
        return finite

    @torch.no_grad()
    def rank_scores(self, layout: FactorLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        _, scratch = self._working_memory(sensitivity)
        scores = layout.views(torch.mul(sensitivity, uncertainty, out=scratch))
        reduced: list[Tensor] = [scratch] * len(scores)
        for kind, indices in layout.members:
            stacked = torch.stack([scores[index] for index in indices])
            means = stacked.flatten(1) if kind == FACTORS_PER_LAYER - 1 else stacked.mean(2 - kind)
            for index, mean in zip(indices, means.unbind(), strict=True):
                reduced[index] = mean
        lora_A, lora_B, lora_E = (torch.cat(reduced[kind::FACTORS_PER_LAYER]) for kind in range(FACTORS_PER_LAYER))
        return lora_E + (lora_A + lora_B)

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
        active = keep if mask_now is None else keep | ~mask_now
        zero_gates(gates, active)
        states = torch.full(active.shape, int(masked_state), dtype=torch.uint8, device=active.device)
        update_plans(plans, states.masked_fill_(active, int(RankState.ACTIVE)))

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
        factors = [*lora_A, *lora_B]
        n = len(lora_A)
        share = weight / (2 * n)
        wanted = gradients or add_to is not None
        computed: list[Tensor] = [factors[0]] * len(factors)
        total: Tensor | None = None
        with torch.autocast(factors[0].device.type, enabled=False):
            for members in _members_by_shape(factors, n):
                stacked = torch.stack([factors[index] for index in members])
                stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
                kept = None if keep is None else torch.stack([keep[index % n] for index in members])
                norms, gradient = _term(stacked, members[0] < n, kept, share, wanted)
                group_sum = norms.sum()
                total = group_sum if total is None else total + group_sum
                if gradient is not None:
                    for index, part in zip(members, gradient.unbind(), strict=True):
                        computed[index] = part
        assert total is not None
        value = total * share
        if add_to is not None:
            scaled = computed if scale == 1.0 else torch._foreach_mul(computed, scale)
            torch._foreach_add_(list(add_to), [part.to(to.dtype) for part, to in zip(scaled, add_to, strict=True)])
            return value, None
        return value, computed if gradients else None


def smooth(average: Tensor, value: Tensor, beta: float, scratch: Tensor, taken: Tensor | None) -> None:
    """Do average ← β·average + (1-β)·value in place, two products and a sum, each rounded.

    Args:
        average: The average.
        value: What it takes in.
        beta: β.
        scratch: Working memory of the same shape.
        taken: None, or a 0-dim bool tensor on the device; False leaves the average as it is.
    """
    # lerp and add with alpha would fuse them and change the last bit.
    torch.mul(value, 1 - beta, out=scratch)
    if taken is None:
        average.mul_(beta).add_(scratch)
    else:
        torch.where(taken, average.mul(beta).add_(scratch), average, out=average)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _members_by_shape(factors: Sequence[Tensor], n: int) -> list[list[int]]:
    members: dict[tuple[bool, torch.Size], list[int]] = {}
    for index, factor in enumerate(factors):
        members.setdefault((index < n, factor.shape), []).append(index)
    return list(members.values())


def _term(
    stacked: Tensor, is_A: bool, kept: Tensor | None, share: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ‖M‖_F of every factor in the stack and, where needed, the stack's gradient times `share`."""
    if kept is not None:
        stacked = stacked * (kept.unsqueeze(2) if is_A else kept.unsqueeze(1))
    # [n, r, r], transposed for B so that both kinds read as M·factor or factor·M below
    gram = torch.bmm(stacked, stacked.mT) if is_A else torch.bmm(stacked.mT, stacked)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.sub_(1 if kept is None else kept.to(gram.dtype))
    norms = torch.linalg.vector_norm(gram, dim=(1, 2))
    if not needs_gradient:
        return norms, None
    coefficient = torch.where(norms == 0, 0.0, (2 * share) / norms)
    gram.mul_(coefficient[:, None, None])
    return norms, torch.bmm(gram, stacked) if is_A else torch.bmm(stacked, gram)
