"""The stand-in for the driver: how it is loaded, what it saw of a launch, and what a launch should have brought."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_PARAMETERS, LARGEST_PARAMETER = 64, 128
MOST_SHARED = 227 * 1024
STREAM = 77
_DECLARED = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[^\n]*?\s)?\w+_param_\d+(?:\[(\d+)\])?")
_BYTES = {"u8": 1, "b8": 1, "u16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}
_ENCODED = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class Launch(ctypes.Structure):
    """`Launch` of libcuda.c."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("overlaps", ctypes.c_int32),
        ("launches", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("parameters", (ctypes.c_uint8 * LARGEST_PARAMETER) * MOST_PARAMETERS),
    )


class StandIn:
    """The library, and Triton's driver upon it."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self._library.last_launch.restype = ctypes.POINTER(Launch)
        # What Triton asks torch, of which this build may know nothing.
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.cuda.is_current_stream_capturing = lambda: False
        torch._C._cuda_getCurrentRawStream = lambda device: STREAM
        import triton
        from triton.backends.nvidia.driver import CudaDriver

        triton.runtime.driver.set_active(CudaDriver())

    @property
    def last(self) -> Launch:
        """What the last launch brought."""
        found: Launch = self._library.last_launch().contents
        return found

    def expect(self, ptx: str) -> int:
        """Let the next launch keep its parameters, as the kernel declares them; returns how many there are."""
        declared = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
        sizes = [_BYTES[kind] * int(count or 1) for kind, count in _DECLARED.findall(declared)]
        if len(sizes) > MOST_PARAMETERS or max(sizes) > LARGEST_PARAMETER:
            raise ValueError(f"found {len(sizes)} parameters of up to {max(sizes)} bytes, libcuda.c has less room")
        self._library.expect_parameters((ctypes.c_int32 * len(sizes))(*sizes), len(sizes))
        return len(sizes)


def faults(
    launch: Launch,
    declared: int,
    ptx: str,
    programs: int,
    types: Mapping[str, str | None],
    arguments: Sequence[Any],
    aligned: Sequence[str],
    overlaps: bool,
) -> list[str]:
    """What is wrong with a launch, in words; `declared` parameters does its kernel have."""
    found = []
    expected: list[tuple[str, bytes]] = []
    for (name, kind), value in zip(types.items(), arguments, strict=True):
        if kind is None:
            if value is not None:
                found.append(f"{name}: compiled as absent, found {type(value).__name__}")
            continue
        if value is None:
            found.append(f"{name}: compiled as {kind}, found None")
            continue
        expected += [(name, packed) for packed in _packed(kind, value)]
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if name in aligned and number % 16:
            found.append(f"{name}: compiled as a multiple of 16, found {number}")
        if isinstance(value, Tensor) and kind.startswith("*") and value.element_size() != _element(kind):
            found.append(f"{name}: compiled as {kind}, found {value.dtype}")
    # What follows is Triton's own memory, which none of our kernels asks for.
    expected += [("Triton's own", bytes(8))] * (declared - len(expected))
    for number, (name, packed) in enumerate(expected):
        brought = bytes(launch.parameters[number])[: len(packed)]
        if brought != packed:
            found.append(f"{name} (parameter {number}): the kernel got {brought.hex()}, expected {packed.hex()}")
    threads = int(re.findall(r"\.(?:reqntid|maxntid) (\d+)", ptx)[0])
    for what, brought, wanted in (
        ("programs", list(launch.grid), [programs, 1, 1]),
        ("threads", list(launch.block), [threads, 1, 1]),
        ("stream", launch.stream, STREAM),
        ("overlap", bool(launch.overlaps), overlaps),
    ):
        if brought != wanted:
            found.append(f"{what}: found {brought}, expected {wanted}")
    if launch.shared > MOST_SHARED:
        found.append(f"shared memory: found {launch.shared} bytes, there are {MOST_SHARED}")
    return found


def _element(kind: str) -> int:
    return {"*i1": 1, "*u8": 1, "*i8": 1, "*bf16": 2, "*fp16": 2, "*i32": 4, "*fp32": 4, "*i64": 8, "*fp64": 8}[kind]


def _packed(kind: str, value: Any) -> list[bytes]:
    """The bytes that an argument's parameters hold."""
    if kind.startswith("*"):
        return [struct.pack("<Q", value.data_ptr())]
    if kind.startswith("tensordesc"):
        base, (rows, columns), (stride, _) = value.base, value.shape, value.strides
        # The driver counts the innermost dimension first.
        box = (value.block_shape[1], value.block_shape[0])
        size = base.element_size()
        # A box is as wide as a line of 128 bytes at the most: Triton moves a wider block in several.
        box = (min(box[0], 128 // size), box[1])
        made = struct.pack("<QQQQIII", base.data_ptr(), columns, rows, stride * size, *box, _ENCODED[base.dtype])
        return [
            made,
            *(struct.pack("<i", each) for each in (rows, columns)),
            *(struct.pack("<q", each) for each in value.strides),
        ]
    return [struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[kind], value)]
