"""What a backend is: who implements the operators, for which calls, and where it is faster than the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.call import Backward, Call, Forward, Request, Shrink


def _nothing_against(*asked: object) -> None:
    """Answer every "why not" with None."""


def _no_words(call: Call) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Allocation:
    """A backend's part in rank allocation.

    Attributes:
        refusal: why it cannot keep averages of a dtype (float32 or float64) on a device.
        disadvantage: why impl="auto" leaves to others what it can serve.
        kernels: makes the kernels of one allocator.
    """

    refusal: Callable[[torch.device, torch.dtype], str | None]
    disadvantage: Callable[[torch.device, torch.dtype], str | None]
    kernels: Callable[[], AllocationKernels]


@dataclass(frozen=True)
class Backend:
    """An implementation of the operators, for `peftkernels.backends.registry.register`.

    Functions that answer "why not" return None where there is nothing against it, else the reason in words.

    Attributes:
        name: what `impl` calls it; the overloads of the operators have this name too.
        disadvantage: why impl="auto" leaves a call that the backend can serve to others, because they are faster.
        forward: y, and S where `Forward.saves_shrink` asks for it, else None. Runs after the arguments were checked.
        backward: the six gradients; for one that is not needed anything, such as what `Backward.empty_gradients` gives.
        shrink: S of several adapters side by side, (M, Σr). None with the two before it: the overloads are implemented
            elsewhere, as C++ does.
        unavailable_reason: why it cannot run in this process, on whatever device.
        refusal: why it cannot serve a call, `Call` or `Shrink`, with x in the dtype of computation.
        sharing_disadvantage: why projections of one x gain nothing by one x·Aᵀ for all of them.
        routes: for `explain`: what ways a call goes inside the backend, in words.
        allocation: its kernels for rank allocation; None where it has none.
        devices: the types of device whose calls impl="auto" asks it about; None for all.
        serves: the names of arguments that it serves and that not every backend does: `Call.later_arguments`.
        compiled: True where its functions read the memory of tensors themselves, instead of by torch's operators. What
            torch.func and forward-mode differentiation need of a call, such a backend cannot give.
    """

    name: str
    disadvantage: Callable[[Request], str | None]
    forward: Callable[[Forward], tuple[Tensor, Tensor | None]] | None = None
    backward: Callable[[Backward], tuple[Tensor, ...]] | None = None
    shrink: Callable[[Shrink], Tensor] | None = None
    unavailable_reason: Callable[[], str | None] = _nothing_against
    refusal: Callable[[Request], str | None] = _nothing_against
    sharing_disadvantage: Callable[[Shrink], str | None] = _nothing_against
    routes: Callable[[Call], dict[str, str]] = _no_words
    allocation: Allocation | None = None
    devices: tuple[str, ...] | None = None
    serves: frozenset[str] = frozenset()
    compiled: bool = False
