"""Where an implementation's tensors lie, and moving calls there with their strides."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels import RankPlan

CPU = torch.device("cpu")
# Implementations that refuse a weight that requires grad.
FROZEN_WEIGHTS = ("cpu", "triton")


def device_of(impl: str) -> torch.device:
    """A GPU for the Triton kernels where there is one; the CPU, for Triton's interpreter, where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if impl == "triton" and torch.cuda.is_available() else CPU


def interpreting() -> bool:
    """Whether the Triton kernels run in Triton's interpreter, about a thousand times slower than C++."""
    return device_of("triton") == CPU


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
