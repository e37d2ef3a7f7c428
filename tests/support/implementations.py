"""Which implementations a test runs on, and the reason where one cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from peftkernels.backends import registry, triton
from peftkernels.ops.call import Shrink
from support.cases import DTYPES
from support.devices import device_of

ALL = ("reference", "eager", "cpu", "triton")


def refusal(impl: str, dtype: str = "fp32") -> str | None:
    """Why this machine or this build has no `impl` for the dtype of x, in the package's words; None where it has."""
    empty = torch.empty(0, 0, dtype=DTYPES[dtype][0], device=device_of(impl))
    return registry.refusal(impl, Shrink(empty, ()))


def skip_unless_served(impl: str, dtype: str = "fp32") -> None:
    """Skip, with the package's own reason, where this machine or this build has no `impl` for the dtype of x."""
    reason = refusal(impl, dtype)
    if reason is not None:
        pytest.skip(f"impl={impl!r}: {reason}")


def served(impl: str, dtypes: Sequence[str]) -> list[str]:
    """Those of `dtypes` that `impl` serves here."""
    return [dtype for dtype in dtypes if refusal(impl, dtype) is None]


def interpreted(impl: str) -> bool:
    """Whether `impl` runs in Triton's interpreter, thousands of times slower than anything else here."""
    return impl == "triton" and triton.interpreting()


def examples(impl: str, count: int) -> int:
    """How many random examples a test takes: a fifteenth where `impl` is interpreted."""
    return count // 15 if interpreted(impl) else count


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
