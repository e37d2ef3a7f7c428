"""Noticing that AdaLoRA is trained and nobody allocates its ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from peftkernels.integrations.peft.steps import count_steps, steps_made


class AllocationWatch:
    """Warns once when an AdaLoRA model is trained and `update_and_allocate` is not called.

    peft's AdaLoRA masks nothing by itself: a training loop has to call `update_and_allocate` after every optimizer
    step, and neither transformers nor trl does. The model reports here what happens to it: `forward` and `allocated`.

    Arguments:
        patience  forwards that count, with no allocation since, before the warning; at least 1
    """

    def __init__(self, patience: int = 20) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience: found {patience!r}, expected an int of at least 1")
        self.patience = patience
        self._warned = False
        self._forwards = 0
        self._seen: tuple[int, tuple[tuple[int, int], ...]] | None = None
        count_steps()

    def forward(self, gates: Iterable[Tensor] | None = None) -> None:
        """The model runs forward in training mode.

        gates  the parameters lora_E. With them a forward counts only where one of them was written, or an optimizer
               made a step, since the last look, so that accumulated batches count once. Without gates every forward
               counts

        Forwards without gradients, and those that torch.compile traces, do not count.
        """
        if self._warned or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if gates is not None:
            seen = steps_made(), tuple((id(gate), gate._version) for gate in gates)
            moved = self._seen is not None and seen != self._seen
            self._seen = seen
            if not moved:
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
