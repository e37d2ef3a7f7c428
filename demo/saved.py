"""What a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def bytes_saved_for_backward(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass; each storage counts once.

    `own` are the parameters and buffers: they are there anyway and do not count.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
