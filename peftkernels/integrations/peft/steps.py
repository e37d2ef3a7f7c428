"""Optimizer steps of this process: fused optimizers write parameters without raising their version."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_made = 0
_counting = False


def count_steps() -> None:
    """Count the steps of every optimizer of this process from now on; further calls change nothing."""
    global _counting
    if not _counting:
        register_optimizer_step_post_hook(_count)
        _counting = True


def steps_made() -> int:
    """Steps since they are counted."""
    return _made


def _count(*_: Any) -> None:
    global _made
    _made += 1
