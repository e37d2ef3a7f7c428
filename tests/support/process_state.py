"""What a test may not leave changed for those that run after it in the same process."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Variables in which pytest and torch's compiler keep notes for themselves.
_NOTES = ("PYTEST_CURRENT_TEST", "_TORCHINDUCTOR", "TORCHINDUCTOR_CACHE_DIR")


def state() -> dict[str, Any]:
    """Switches and settings that are the process's, by name."""
    found: dict[str, Any] = {
        "working directory": os.getcwd(),
        "modules that may not be imported": {name for name, module in sys.modules.items() if module is None},
        "torch's threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
    }
    if "peftkernels._C" in sys.modules:
        from peftkernels.backends import cpu

        kept = cpu.pack_cache_stats()
        found |= {"pack mode": kept["mode"], "pack limit": kept["limit_setting"]}
    found |= {f"${name}": value for name, value in os.environ.items() if not name.startswith(_NOTES)}
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in words. The C++ kernels may have been loaded meanwhile."""
    fresh = {name for name in ("pack mode", "pack limit") if name not in before}
    return [
        f"{name}: found {after.get(name, 'nothing')!r}, expected {before.get(name, 'nothing')!r}"
        for name in sorted({*before, *after} - fresh)
        if before.get(name) != after.get(name)
    ]


def forget_what_was_compiled() -> None:
    """Empty the cache of torch's compiler, which gives up on code that it has compiled eight times for others."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@contextmanager
def numbers_of(name: str) -> Iterator[None]:
    """Random numbers that are drawn in the block without a seed depend on `name` alone, and on none before it."""
    digest = hashlib.sha256(name.encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
