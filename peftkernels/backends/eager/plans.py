"""Writing masks to many layers at once: their gates and their rank plans, in a few calls whatever their number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkernels.ops.rank_plan import RankPlan, RankState


def update_plans(plans: Sequence[RankPlan], states: Tensor) -> None:
    """Call `plan.update_(state)` for every plan, in place and without synchronising with the host.

    Plans of equal rank are handled together.

    Args:
        plans: The plans.
        states: uint8 (Σ r,), the plans' states one after the other, on their device.
    """
    ranks = [plan.state.numel() for plan in plans]
    per_plan = states.split(ranks)
    for r in sorted(set(ranks)):
        members = [index for index, rank in enumerate(ranks) if rank == r]
        stacked = torch.stack([per_plan[index] for index in members])
        order = torch.sort(stacked, dim=1, descending=True, stable=True).indices.to(torch.int32)
        active = (stacked == RankState.ACTIVE).sum(1)
        counts = torch.stack((active, (stacked != RankState.DEAD).sum(1)), dim=1).to(torch.int32)
        torch._foreach_copy_(
            [plans[index].state for index in members]
            + [plans[index].order for index in members]
            + [plans[index].counts for index in members],
            [*stacked.unbind(), *order.unbind(), *counts.unbind()],
        )


def zero_gates(gates: Sequence[Tensor], keep: Tensor) -> None:
    """Set to zero, in place, every gate whose rank is not kept; the others keep their bits.

    Args:
        gates: Tensors of any shapes and float dtypes.
        keep: bool (Σ numel,) on their device.
    """
    with torch.no_grad():
        flat = torch.cat([gate.reshape(-1) for gate in gates]).masked_fill_(~keep, 0.0)
        parts = flat.split([gate.numel() for gate in gates])
        torch._foreach_copy_(list(gates), [part.view_as(gate) for part, gate in zip(parts, gates, strict=True)])
