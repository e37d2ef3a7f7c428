"""Which implementations a test runs on, and the reason where one cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from peftkernels import dispatch
from support.cases import DTYPES

ALL = ("reference", "eager", "cpu")


def skip_unless_served(impl: str, dtype: str = "fp32") -> None:
    """Skip, with the package's own reason, where this machine or this build has no `impl` for the dtype of x."""
    empty = torch.empty(0, 0, dtype=DTYPES[dtype][0])
    reason = dispatch.refusal(impl, empty, empty)
    if reason is not None:
        pytest.skip(f"impl={impl!r}: {reason}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
