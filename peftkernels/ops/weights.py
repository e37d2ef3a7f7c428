"""Frozen weights as operands: a plain tensor, or a type that knows its shape and can be made one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class FrozenWeight(ABC):
    """A frozen weight (N, K) that is no plain tensor, such as a quantised one.

    A call makes it a tensor for the forward pass and again for the backward pass, and keeps the object in between.

    Attributes:
        shape: (N, K).
        dtype: that of the tensor which `materialize` makes.
        device: where that tensor lies.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad = False

    @abstractmethod
    def materialize(self) -> Tensor:
        """Return the weight as a new tensor (N, K) without gradient: the same values at every call."""


Weight = Tensor | FrozenWeight
