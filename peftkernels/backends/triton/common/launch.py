"""One compiled form of a kernel, and how it is launched.

Types, alignment and constants of every form are stated, not read off the arguments of a call: a call pays for no
inspection, changes of value compile nothing anew, and what the tests compile without a GPU is what runs on one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETER, _LOADING = threading.Lock(), threading.Lock()
_KERNELS: dict[tuple[Any, ...], CompiledKernel] = {}

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


def pointer(dtype: torch.dtype | None) -> str | None:
    """The type of a pointer to floats of `dtype`; None for an argument that is not there."""
    return None if dtype is None else f"*{TYPES[dtype]}"


def descriptor(dtype: torch.dtype, block: list[int]) -> str:
    """The type of a tensor descriptor that moves blocks of this shape."""
    return f"tensordesc<{TYPES[dtype]}[{', '.join(map(str, block))}]>"


def integers(*names: str) -> dict[str, str | None]:
    """Sizes and strides; products of them are taken in 64 bits."""
    return dict.fromkeys(names, "i32")


def options(warps: int, stages: int, pdl: bool = False) -> dict[str, Any]:
    """Compile options, all of them stated so that every version of Triton takes the same."""
    return {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl, "enable_fp_fusion": True}


class Variant:
    """A kernel with the types of its arguments, its constants and its compile options fixed.

    Args:
        function: Made by `triton.jit`; arguments first, then the constants (annotated `tl.constexpr`).
        types: For each argument its type ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"), or None for an optional
            one that is not there.
        constants: For each constant its value.
        aligned: Arguments that are multiples of 16 (pointers: of 16 bytes).
        options: num_warps, num_stages, launch_pdl, …
        awaited: Arguments whose memory the launch before this one writes: where launches overlap (launch_pdl), the
            compiled code may read them, and write anything at all, only after its wait.
        wgmma: True if the compiled code must multiply with a warpgroup's instructions where the GPU has them.
        label: What sets this form apart from others of the kernel.

    Raises:
        TypeError: Where types and constants are not the function's parameters in their order.
    """

    def __init__(
        self,
        function: Any,
        types: Mapping[str, str | None],
        constants: Mapping[str, Any],
        *,
        aligned: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
        awaited: tuple[str, ...] = (),
        wgmma: bool = False,
        label: str = "",
    ) -> None:
        expected = list(function.arg_names)
        if [*types, *constants] != expected:
            raise TypeError(f"{function.__name__}: found {[*types, *constants]}, expected {expected}")
        self.function = function
        self.types = dict(types)
        self.constants = dict(constants)
        self.aligned = aligned
        self.options = dict(options or {})
        self.awaited = awaited
        self.wgmma = wgmma
        self.label = label
        self._loaded: dict[int, CompiledKernel] = {}
        self._constants = tuple(self.constants.values())

    @property
    def name(self) -> str:
        """The kernel's name and what sets this form apart."""
        return f"{self.function.__name__}[{self.label}]" if self.label else str(self.function.__name__)

    @property
    def overlaps(self) -> bool:
        """True if a launch of it may begin before the one before it has ended."""
        return bool(self.options.get("launch_pdl"))

    def expects_wgmma(self, capability: tuple[int, int]) -> bool:
        """Return True if code for this compute capability must hold wgmma (9.x) or tcgen05 (10.x) instructions."""
        return self.wgmma and capability[0] in (9, 10)

    def compile(self, capability: tuple[int, int]) -> CompiledKernel:
        """Return the machine code for a compute capability; needs no GPU."""
        names = list(self.function.arg_names)
        signature = {name: kind or "constexpr" for name, kind in self.types.items()}
        signature |= dict.fromkeys(self.constants, "constexpr")
        fixed = {(names.index(name),): None for name, kind in self.types.items() if kind is None}
        fixed |= {(names.index(name),): value for name, value in self.constants.items()}
        attributes = {(names.index(name),): _DIVISIBLE_BY_16 for name in self.aligned if self.types[name] is not None}
        source = ASTSource(self.function, signature, fixed, attributes)
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        return triton.compile(source, target=target, options=self.options)

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch `programs` programs on the current device and stream.

        Args:
            programs: The size of the grid.
            arguments: The kernel's arguments in the order of `types`.

        Raises:
            RuntimeError: Where a CUDA graph is captured and the kernel is not loaded yet.
        """
        if INTERPRETED:
            # The interpreter keeps the program that it runs in globals.
            with _INTERPRETER:
                self.function[(programs,)](*arguments, **self.constants)
            return
        device = torch.cuda.current_device()
        compiled = self._loaded.get(device) or self._load(device)
        hooks = triton.knobs.runtime
        if getattr(hooks.launch_enter_hook, "calls", hooks.launch_enter_hook) or getattr(
            hooks.launch_exit_hook, "calls", hooks.launch_exit_hook
        ):
            compiled[(programs, 1, 1)](*arguments, *self._constants)
            return
        # What subscription does, without what it prepares for hooks that nobody set.
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self._constants,
        )  # fmt: skip

    def _load(self, device: int) -> CompiledKernel:
        """The kernel in the device's memory. Once there it stays: work that is queued or captured may need it."""
        key = (device, self.function, *map(repr, (self.types, self.constants, self.aligned, self.options)))
        with _LOADING:
            compiled = _KERNELS.get(key)
            if compiled is None:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"{self.name} was not called yet, and kernels cannot be loaded while a CUDA graph is captured: "
                        "make one call of the same shapes and options before the capture"
                    )
                compiled = self.compile(torch.cuda.get_device_capability(device))
                compiled[(1, 1, 1)]  # loads it; nothing is launched before arguments come
                _KERNELS[key] = compiled
            self._loaded[device] = compiled
        return compiled


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; the interpreter stands for one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Return the device's name as the driver has it, which is also that of a table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the device's compute capability; the interpreter can do what 9.0 can, but overlaps no launches."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


_without_overlap = False


@contextmanager
def without_overlap() -> Iterator[None]:
    """In the block no launch begins before the one before it has ended; for tests and for measuring, in all threads."""
    global _without_overlap
    before, _without_overlap = _without_overlap, True
    try:
        yield
    finally:
        _without_overlap = before


def overlaps(device: torch.device) -> bool:
    """Return True if a launch may begin while the one before it ends (programmatic dependent launch)."""
    return not (_without_overlap or INTERPRETED) and capability(device) >= (9, 0)
