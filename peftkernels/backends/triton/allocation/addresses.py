"""Where the tensors of many layers lie, as tables in the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]


def capturing(device: torch.device) -> bool:
    """Return True if the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, without waiting for the device."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


class Addresses:
    """A table of the addresses of a list of tensors, sent to the device again only when one of them has moved.

    A tensor whose numbers do not lie one after the other is copied to a place of its own, before the launch and, where
    a kernel writes it, by `write_back` after it. That a tensor's address is the old one is taken to mean that dtype and
    strides are, too: while one tensor is made from another both exist.

    Args:
        name: What errors call the tensors.
        take: Called with tensors that lie elsewhere than those before; where it raises, nothing changes.

    Attributes:
        table: int64 (tensors,), 0 for None and for tensors without elements.
        dtypes: The dtype of each tensor, None for None.
        aligned: True if all addresses are multiples of 16.
        kept: Tables and copies that CUDA graphs read.
    """

    def __init__(self, name: str, take: Callable[[Tensors], None]) -> None:
        self._name = name
        self._accept = take
        self._found: tuple[int, ...] | None = None
        self._staged: list[tuple[int, Tensor]] = []
        self._recorded = False
        self.kept: list[Tensor] = []
        self.table = torch.empty(0, dtype=torch.int64)
        self.dtypes: tuple[torch.dtype | None, ...] = ()
        self.aligned = True

    def forget(self) -> None:
        """Take the next tensors, wherever they lie, for others than before."""
        self._found = None

    def update(self, tensors: Tensors, device: torch.device, recording: bool) -> bool:
        """Bring the table up to date, and return True if it is another than before.

        Args:
            tensors: As many as the kernels expect.
            device: Where the table goes.
            recording: True while a CUDA graph records.

        Raises:
            RuntimeError: Where the table would have to change while a CUDA graph records.
        """
        try:
            found = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        except TypeError:
            found = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        moved = found != self._found or self.table.device != device
        if moved:
            if recording:
                raise RuntimeError(
                    f"{self._name} lie elsewhere than in the last call, and the table of their addresses cannot be "
                    "changed while a CUDA graph is captured: make one call with the same tensors before the capture, "
                    "and keep gradients where they are (zero_grad(set_to_none=False))"
                )
            self._take(tensors, found, device)
        self._recorded |= recording
        for place, copy in self._staged:
            copy.copy_(tensors[place])  # type: ignore[arg-type]
        return moved

    def write_back(self, tensors: Sequence[Tensor]) -> None:
        """Copy what kernels wrote to tensors that are not contiguous."""
        for place, copy in self._staged:
            tensors[place].copy_(copy)

    def _take(self, tensors: Tensors, found: tuple[int, ...], device: torch.device) -> None:
        elsewhere = {tensor.device for tensor in tensors if tensor is not None} - {device}
        if elsewhere:
            raise ValueError(f"{self._name}: found tensors on {min(map(str, elsewhere))}, expected all on {device}")
        self._accept(tensors)
        if self._recorded:
            self.kept += [self.table, *(copy for _, copy in self._staged)]
            self._recorded = False
        self._staged = [
            (place, torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False))
            for place, tensor in enumerate(tensors)
            if tensor is not None and not tensor.is_contiguous()
        ]
        addresses = list(found)
        for place, copy in self._staged:
            addresses[place] = copy.data_ptr()
        self.table = sent(torch.tensor(addresses, dtype=torch.int64), device)
        self.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        bits = 0
        for address in addresses:
            bits |= address
        self.aligned = bits & 15 == 0
        self._found = found
