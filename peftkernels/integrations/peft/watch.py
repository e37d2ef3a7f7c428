"""Noticing that AdaLoRA is trained without allocating its ranks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels.integrations.peft.steps import count_steps, steps_made


class AllocationWatch:
    """Warns once when an AdaLoRA model is trained and `update_and_allocate` is not called.

    peft's AdaLoRA masks nothing by itself: a training loop has to call `update_and_allocate` after every optimizer
    step, and neither transformers nor trl does. The model reports here what happens to it: `forward` and `allocated`.

    Args:
        patience: forwards that count, with no allocation since, before the warning; at least 1.
    """

    def __init__(self, patience: int = 20) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience: found {patience!r}, expected an int of at least 1")
        self.patience = patience
        self._warned = False
        self._forwards = 0
        self._steps = 0
        self._seen: list[tuple[weakref.ref[Tensor], int]] | None = None
        count_steps()

    def forward(self, gates: Iterable[Tensor] | None = None) -> None:
        """The model runs forward in training mode. Without gradients, or traced by torch.compile, it does not count.

        Args:
            gates: the parameters lora_E. With them a forward counts only where one of them was written, or an optimizer
                made a step, since the last look, so that accumulated batches count once. Without gates every forward
                counts.
        """
        if self._warned or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if gates is not None and not self._moved(list(gates)):
            return
        self._forwards += 1
        if self._forwards >= self.patience:
            self._warned = True
            warnings.warn(
                f"AdaLoRA has been trained for {self._forwards} steps without a call of update_and_allocate, so no "
                "rank is ever masked: give transformers.Trainer or a trl trainer "
                "callbacks=[peftkernels.integrations.transformers.AdaLoraCallback()], or call "
                "model.base_model.update_and_allocate(step) after every optimizer.step() and before zero_grad()",
                UserWarning,
                stacklevel=3,
            )

    def allocated(self) -> None:
        """`update_and_allocate` was called."""
        self._forwards = 0
        self._seen = None

    def _moved(self, gates: Sequence[Tensor]) -> bool:
        """Look at the gates; True where one was written, or an optimizer made a step, since the last look."""
        before, self._seen = self._seen, [(weakref.ref(gate), _version(gate)) for gate in gates]
        steps, self._steps = self._steps, steps_made()
        if before is None:
            return False
        same = len(before) == len(gates) and all(
            seen() is gate and version == _version(gate) for (seen, version), gate in zip(before, gates, strict=True)
        )
        return steps != self._steps or not same

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}


def _version(tensor: Tensor) -> int:
    """How often the tensor was written; tensors made in inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version
