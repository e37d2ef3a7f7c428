"""The machine and the versions that figures belong to."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import peftkernels

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "matplotlib")
# Names in torch.cpu.get_capabilities() and here: the instruction sets that matrix products can use.
_FEATURES = {"avx2": "avx2", "avx512_f": "avx512", "avx512_bf16": "avx512_bf16", "amx_tile": "amx"}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed versions by package, peftkernels and python first; None where a package is not installed."""
    found: dict[str, str | None] = {"peftkernels": peftkernels.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """System, processor, cores, threads and instruction sets.

    ``features`` holds a bool for each of avx2, avx512, avx512_bf16 and amx, or None where torch cannot tell;
    ``torch_kernels`` is the instruction set that torch's own CPU kernels use.
    """
    read = getattr(torch.cpu, "get_capabilities", None)
    capabilities = dict(read()) if read is not None else {}
    return {
        "system": platform.platform(),
        "processor": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "features": {ours: capabilities.get(theirs) for theirs, ours in _FEATURES.items()},
    }
