"""CUDA C++ kernels (csrc/cuda): this version has none, and says so where they are asked for."""

from __future__ import annotations

from peftkernels.backends.backend import Backend
from peftkernels.ops.call import Request

_UNAVAILABLE = "this version of peftkernels has no CUDA C++ kernels"


def _unavailable_reason() -> str:
    return _UNAVAILABLE


def _refusal(request: Request) -> str:
    return _UNAVAILABLE


BACKEND = Backend(
    "cuda",
    disadvantage=_refusal,
    unavailable_reason=_unavailable_reason,
    refusal=_refusal,
    devices=("cuda",),
    compiled=True,
)
