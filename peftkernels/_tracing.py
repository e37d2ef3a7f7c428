"""What torch.compile takes of Python code that it cannot trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, without importing the whole compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
