"""Where an implementation's tensors lie, and moving calls there with their strides."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels import RankPlan
from peftkernels.backends import triton

CPU = torch.device("cpu")
# Implementations that refuse a weight that requires grad.
FROZEN_WEIGHTS = ("cpu", "triton")


def device_of(impl: str) -> torch.device:
    """A GPU for the Triton kernels where they are compiled for one; the CPU where they are interpreted."""
    if impl != "triton" or triton.interpreting() or not torch.cuda.is_available():
        return CPU
    return torch.device("cuda", torch.cuda.current_device())


def moved(value: Tensor, device: torch.device) -> Tensor:
    """The same values with the same strides and offset, inside a copy of the same storage."""
    if value.device == device:
        return value
    elements = value.untyped_storage().nbytes() // value.element_size()
    storage = value.detach().as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset()).requires_grad_(value.requires_grad)


def moved_plan(plan: RankPlan, device: torch.device) -> RankPlan:
    if plan.state.device == device:
        return plan
    return RankPlan(*(moved(value, device) for value in (plan.state, plan.order, plan.counts)))
