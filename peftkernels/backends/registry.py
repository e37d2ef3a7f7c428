"""The backends by name, which of them serves a call, and the reason in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkernels.backends import cuda, reference
from peftkernels.backends.backend import Backend
from peftkernels.backends.cpu import serving as cpu
from peftkernels.backends.eager import serving as eager
from peftkernels.backends.triton import serving as triton
from peftkernels.ops import schemas
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.call import Backward, Call, Forward, Record, Request, Shrink

_OURS = (reference.BACKEND, eager.BACKEND, cpu.BACKEND, triton.BACKEND, cuda.BACKEND)
_BACKENDS = {backend.name: backend for backend in _OURS}
# What "auto" asks, fastest first. The last serves every call.
_AUTOMATIC = ["cuda", "triton", "cpu", "eager"]


class Operators(NamedTuple):
    """What computes a call: the overloads of the operators, and the functions of Python behind the first two.

    The functions are called where no mode, no subclass, no tracer and no transform would see the operator.
    """

    forward: Any
    backward: Any
    shrink: Any
    functions: tuple[schemas.ForwardFunction, schemas.BackwardFunction] | None = None


def _served(name: str, call: Record) -> Backend:
    """The backend behind an overload. Refuses what `choose` would refuse: an operator may be called by anybody."""
    reason = refusal(name, call.request()) if name in _BACKENDS else "it was taken out of the registry"
    if reason is not None:
        raise RuntimeError(f"impl={name!r} cannot serve this call: {reason}")
    return _BACKENDS[name]


def _implement(name: str) -> None:
    """Implement a backend's overloads by the functions that it has when they are called."""

    def forward(call: Forward) -> tuple[Tensor, Tensor | None]:
        function = _served(name, call).forward
        assert function is not None
        return function(call)

    def backward(call: Backward) -> tuple[Tensor, ...]:
        function = _served(name, call).backward
        assert function is not None
        return function(call)

    def shrink(call: Shrink) -> Tensor:
        function = _served(name, call).shrink
        assert function is not None
        return function(call)

    schemas.implement(name, forward, backward, shrink)


def _operators(backend: Backend) -> Operators:
    functions = None
    if backend.forward is not None and backend.backward is not None:
        functions = backend.forward, backend.backward
    forward, backward, shrink = schemas.overloads(backend.name)
    return Operators(forward, backward, shrink, functions)


# The operators of each backend that has them.
OPERATORS = {name: _operators(_BACKENDS[name]) for name in schemas.IMPLEMENTATIONS}
# Whose overloads are declared. They outlive a backend that is taken out: torch forgets no operator.
_DECLARED = set(OPERATORS)
for _name, _ours in OPERATORS.items():
    if _ours.functions is not None:
        _implement(_name)


class Registration:
    """A backend that was registered, until `remove` is called."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._stands = True

    def remove(self) -> None:
        """Take the backend out of the registry; does nothing when it is out."""
        if not self._stands:
            return
        self._stands, name = False, self.backend.name
        del _BACKENDS[name], OPERATORS[name]
        _AUTOMATIC.remove(name)
        _renew_direct_call()


def register(backend: Backend) -> Registration:
    """Add a backend: `impl` takes it by its name, and impl="auto" asks it before all that were there.

        registration = peftkernels.register_backend(Backend("mine", disadvantage=…, forward=…, backward=…, shrink=…))
        y = peftkernels.lora_linear(x, weight, lora_A, lora_B, impl="mine")

    The overloads `torch.ops.peftkernels.lora_linear_fwd.mine` and so on are declared, with the checks and fakes that
    all backends share.

    Args:
        backend: with `forward` and `backward`; where `shrink` is None, `shared_shrink` is refused by this name.

    Returns:
        What `Registration.remove` takes it out by.

    Raises:
        TypeError: something that is no `Backend`, or one without functions.
        ValueError: a name that is taken or no Python identifier.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: found {type(backend).__name__}, expected a Backend")
    name = backend.name
    if backend.forward is None or backend.backward is None:
        raise TypeError(f"backend: found {name!r} without forward or backward, expected both functions")
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or name in ("auto", "default", *_BACKENDS):
        taken = ", ".join(("auto", "default", *_BACKENDS))
        raise ValueError(
            f"backend: found the name {name!r}, expected lower-case letters, digits and underscores, and not {taken}"
        )
    if name not in _DECLARED:
        schemas.declare(name)
        _implement(name)
        _DECLARED.add(name)
    _BACKENDS[name] = backend
    OPERATORS[name] = _operators(backend)
    _AUTOMATIC.insert(0, name)
    _renew_direct_call()
    return Registration(backend)


def names() -> tuple[str, ...]:
    """What `impl` may be beside "auto"."""
    return tuple(_BACKENDS)


def backend(name: str) -> Backend:
    """The backend of this name, one of `names`."""
    return _BACKENDS[name]


def backend_status() -> dict[str, str | None]:
    """For every backend by name: None when it can run in this process, else why it cannot."""
    return {name: backend.unavailable_reason() for name, backend in _BACKENDS.items()}


def refusal(impl: str, request: Request) -> str | None:
    """None when `impl` can serve this call (x in the dtype of computation), else why it cannot."""
    backend = _BACKENDS[impl]
    if isinstance(request, Shrink) and backend.forward is not None and backend.shrink is None:
        return f"{impl!r} makes no S of several adapters at once"
    if isinstance(request, Call) and (later := request.later_arguments()) and (unserved := later - backend.serves):
        return f"it does not serve {', '.join(sorted(unserved))}"
    return backend.refusal(request)


def disadvantage(impl: str, request: Request) -> str | None:
    """None when "auto" may take `impl`, else why it cannot or would be slower than others."""
    reason = refusal(impl, request)
    return _BACKENDS[impl].disadvantage(request) if reason is None else reason


def choose(impl: str, request: Request) -> str:
    """The backend that serves a call.

    "auto" takes the fastest that can; any other name is taken or refused, never replaced.

    Raises:
        ValueError: an unknown name.
        RuntimeError: one that cannot serve, with the reason.
    """
    if impl == "auto":
        device = request.x.device.type
        for name in _AUTOMATIC:
            devices = _BACKENDS[name].devices
            if (devices is None or device in devices) and disadvantage(name, request) is None:
                return name
        raise AssertionError("the eager backend serves every call")
    if not isinstance(impl, str) or impl not in _BACKENDS:
        check_name(impl)
    reason = refusal(impl, request)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot serve this call: {reason}")
    return impl


def check_name(impl: str) -> None:
    """Raise ValueError for what is neither "auto" nor a backend's name."""
    if impl not in ("auto", *_BACKENDS):
        raise ValueError(f"impl: found {impl!r}, expected 'auto' or one of {', '.join(_BACKENDS)}")


def sharing_disadvantage(impl: str, request: Shrink) -> str | None:
    """None when projections of the same x gain by one x·Aᵀ for all of them, else why not. Raises as `choose`."""
    return _BACKENDS[choose(impl, request)].sharing_disadvantage(request)


def allocation_names() -> tuple[str, ...]:
    """What `impl` may be for rank allocation, beside "auto"."""
    return tuple(name for name, backend in _BACKENDS.items() if backend.allocation is not None)


def kernels_for(device: torch.device, dtype: torch.dtype, impl: str = "auto") -> AllocationKernels:
    """Make the kernels of one allocator.

    Args:
        device: where the layers are.
        dtype: of the averages, float32 or float64.
        impl: "auto" for the fastest that can serve, or one of `allocation_names`, which is served or refused.

    Raises:
        ValueError: another name.
        RuntimeError: the one that was named cannot serve, with the reason.
    """
    offered = {name: backend.allocation for name, backend in _BACKENDS.items() if backend.allocation is not None}
    if impl != "auto":
        if impl not in tuple(offered):
            raise ValueError(f"impl: found {impl!r}, expected one of auto, {', '.join(offered)}")
        reason = offered[impl].refusal(device, dtype)
        if reason is not None:
            raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
        return offered[impl].kernels()
    for name in _AUTOMATIC:
        part = offered.get(name)
        if part is not None and part.refusal(device, dtype) is None and part.disadvantage(device, dtype) is None:
            return part.kernels()
    raise AssertionError("the eager backend serves every device")


_second_derivatives: Callable[..., list[Tensor | None]] | None = None


def direct_call(second_derivatives: Callable[..., list[Tensor | None]]) -> Callable[..., Tensor | None] | None:
    """The C++ entry for plain calls, or None where the C++ kernels cannot run; see `cpu.serving.direct_call`."""
    global _second_derivatives
    _second_derivatives = second_derivatives
    return cpu.direct_call(second_derivatives, automatic=_AUTOMATIC[0] == _OURS[-1].name)


def _renew_direct_call() -> None:
    """Tell the C++ entry, where there is one, whether "auto" asks other backends first."""
    if _second_derivatives is not None:
        direct_call(_second_derivatives)


@dataclass(frozen=True)
class Explanation:
    """What `impl="auto"` takes for a call, and why each faster backend was not taken.

    Attributes:
        chosen: the backend's name, or "composition" where the call is made of operations of torch.
        why_not: for each faster one, the reason.
        routes: on "triton", for the forward and the backward product, which way it goes, and why.
    """

    chosen: str
    why_not: dict[str, str] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"lora_linear runs on {self.chosen!r}"]
        lines += [f"  {direction}: {route}" for direction, route in self.routes.items()]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explain_choice(call: Call, transform: str | None = None) -> Explanation:
    """`choose("auto", …)` with its reasons, fastest backend first; what a transform keeps from backends is composed."""
    if transform is not None:
        reason = f"the call is differentiated by {transform}, which kernels do not follow"
        return Explanation("composition", dict.fromkeys(_AUTOMATIC, reason))
    chosen = choose("auto", call)
    why_not = {name: disadvantage(name, call) for name in _AUTOMATIC[: _AUTOMATIC.index(chosen)]}
    reasons = {name: reason for name, reason in why_not.items() if reason is not None}
    return Explanation(chosen, reasons, _BACKENDS[chosen].routes(call))
