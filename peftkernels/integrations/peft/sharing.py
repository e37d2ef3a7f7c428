"""One x·Aᵀ for projections that read the same input, such as q, k and v, or gate and up: found as the model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkernels._autocast import autocast_dtype
from peftkernels.functional.shrink import shared_shrink
from peftkernels.integrations.peft.steps import steps_made


class _Part(NamedTuple):
    """S for one projection, and the factor that it was made of."""

    shrink: Tensor
    factor: weakref.ref[Tensor]
    version: int
    memory: Tensor

    @classmethod
    def of(cls, shrink: Tensor, factor: Tensor) -> _Part:
        # The second tensor holds the memory that the factor lies in now, so that no other tensor can get the same.
        return cls(shrink, weakref.ref(factor), factor._version, factor.detach())

    def was_made_of(self, factor: Tensor) -> bool:
        return self.factor() is factor and self.version == factor._version and self.memory.is_set_to(factor)


class _Input(NamedTuple):
    """A tensor that a projection has just read, in which dtype, and what was made of it for its siblings."""

    tensor: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    steps: int
    leader: weakref.ref[nn.Module]
    parts: weakref.WeakKeyDictionary[nn.Module, _Part]

    def is_still(self, x: Tensor) -> bool:
        if self.tensor() is not x or self.version != x._version or self.steps != steps_made():
            return False
        return self.dtype is autocast_dtype(x.dtype, x.device.type)


class SharedInput:
    """Of the adapted children of one module: who reads the same tensor as whom, and S of the tensor that is read now.

    The first projection that is called with a tensor leads, and those that are called with the same object after it
    follow. When the leader is called again, it makes S for its followers too, each of which takes its part once, before
    the leader's next call. One that did not come for it follows no more. A part is used only for the very tensor and
    the very factor that it was made of, neither written to since; what is written through `.data` between the leader's
    call and a follower's is not seen. Copies and files hold nothing of this.
    """

    def __init__(self) -> None:
        self._now: _Input | None = None
        self._followers: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> Any:
        return SharedInput, ()

    def shrink(
        self, module: nn.Module, x: Tensor, factor: Tensor, impl: str, factor_of: Callable[[Any, Tensor], Tensor | None]
    ) -> Tensor | None:
        """S (M, r) of x and ``factor`` where it is made together with others, None where the call makes its own.

        Args:
            module: the projection that is called with x, served and without dropout.
            x: (M, K), the very tensor that the projection reads.
            factor: its A (r, K).
            impl: the implementation that makes S.
            factor_of: A of a sibling if a call of it with x would be served without dropout, else None.
        """
        if x.is_inference() or factor.is_inference():
            # Such tensors do not count how often they were written.
            return None
        now = self._now
        if now is not None and now.is_still(x) and now.leader() is not module:
            return self._follow(now, module, factor)
        return self._lead(module, x, factor, impl, factor_of)

    def _follow(self, now: _Input, module: nn.Module, factor: Tensor) -> Tensor | None:
        part = now.parts.pop(module, None)
        if part is not None:
            return part.shrink if part.was_made_of(factor) else None
        leader = now.leader()
        if leader is not None:
            followers = self._followers.setdefault(leader, [])
            if all(follower() is not module for follower in followers):
                followers.append(weakref.ref(module))
        return None

    def _lead(
        self, module: nn.Module, x: Tensor, factor: Tensor, impl: str, factor_of: Callable[[Any, Tensor], Tensor | None]
    ) -> Tensor | None:
        self._drop_those_who_did_not_come()
        parts: weakref.WeakKeyDictionary[nn.Module, _Part] = weakref.WeakKeyDictionary()
        dtype = autocast_dtype(x.dtype, x.device.type)
        self._now = _Input(weakref.ref(x), x._version, dtype, steps_made(), weakref.ref(module), parts)
        found = [follower for one in self._followers.get(module, ()) if (follower := one()) is not None]
        others = [(one, A) for one in found if (A := factor_of(one, x)) is not None and not A.is_inference()]
        if not others:
            return None
        own, *shrinks = shared_shrink(x, [factor, *(A for _, A in others)], impl=impl)
        for (one, A), shrink in zip(others, shrinks, strict=True):
            parts[one] = _Part.of(shrink, A)
        return own

    def _drop_those_who_did_not_come(self) -> None:
        leader = None if self._now is None else self._now.leader()
        if leader is None or self._now is None or not self._now.parts:
            return
        left = self._now.parts
        followers = self._followers.get(leader, [])
        followers[:] = [one for one in followers if (follower := one()) is not None and follower not in left]


def can_share() -> bool:
    """Return True in an ordinary call, which torch.compile does not trace."""
    return not torch.compiler.is_compiling()
