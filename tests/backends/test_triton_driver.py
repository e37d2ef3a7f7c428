"""Launches through Triton's own launcher onto a driver that computes nothing: what a kernel would be given on a GPU.

The interpreter takes Python's arguments as they are, and compiling shows no launch; here each argument comes to the
driver as the machine code reads it, maps of the tensor memory accelerator included.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.driver.stand_in import STREAM, Launch, faults

triton = pytest.importorskip("triton", reason="Triton is not installed")

SUPPORT = Path(__file__).parents[1] / "support" / "driver"
SECONDS = 900


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every launch of the calls in `support.driver.launches`."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler, which Triton's launchers need too")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    built = folder / "libcuda.so.1"
    build = [compiler, "-std=c11", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I", str(headers)]
    subprocess.run([*build, str(SUPPORT / "libcuda.c"), "-o", str(built)], check=True, timeout=SECONDS)
    (folder / "libcuda.so").symlink_to(built.name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "support.driver.launches", str(folder)],
        env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_gets_what_it_was_compiled_for(launches: list[dict[str, Any]]) -> None:
    wrong = {each["name"]: each["faults"] for each in launches if each["faults"]}
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_kernel_is_launched(launches: list[dict[str, Any]]) -> None:
    from peftkernels.backends.triton import shipped

    assert {each["kernel"] for each in launches} == {one.function.__name__ for one in shipped.variants((9, 0))}


PTX = """.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
{"""
TYPES = {"x_ptr": "*bf16", "gate_ptr": None, "M": "i32"}


def _launch(x: torch.Tensor, m: int) -> Launch:
    """As the driver would see a launch of three programs."""
    seen = Launch(shared=1024, stream=STREAM, overlaps=1)
    seen.grid[:], seen.block[:] = [3, 1, 1], [128, 1, 1]
    for number, packed in enumerate((struct.pack("<Q", x.data_ptr()), struct.pack("<i", m))):
        seen.parameters[number][: len(packed)] = list(packed)
    return seen


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({}, None),
        ({"arguments": (0, None, 48)}, "x_ptr (parameter 0): the kernel got"),
        ({"arguments": (16, None, 50)}, "M (parameter 1): the kernel got 30000000, expected 32000000"),
        ({"arguments": (0, "gate", 48)}, "gate_ptr: compiled as absent, found str"),
        ({"arguments": (None, None, 48)}, "x_ptr: compiled as *bf16, found None"),
        ({"aligned": ("x_ptr", "M"), "arguments": (16, None, 50)}, "M: compiled as a multiple of 16, found 50"),
        ({"programs": 4}, "programs: found [3, 1, 1], expected [4, 1, 1]"),
        ({"overlaps": False}, "overlap: found True, expected False"),
        ({"ptx": PTX.replace("128", "256")}, "threads: found [128, 1, 1], expected [256, 1, 1]"),
        ({"types": {**TYPES, "x_ptr": "*fp32"}}, "x_ptr: compiled as *fp32, found torch.bfloat16"),
    ],
)
def test_a_wrong_launch_is_seen(changed: dict[str, Any], part: str | None) -> None:
    x = torch.zeros(32, dtype=torch.bfloat16)
    taken: dict[str, Any] = {"ptx": PTX, "programs": 3, "types": TYPES, "aligned": ("x_ptr",), "overlaps": True}
    taken |= {"arguments": (16, None, 48), **changed}
    # Numbers stand for where x begins: at 16 is the tensor that the launch saw, at 0 another.
    first = {16: x, 0: torch.zeros(32, dtype=torch.bfloat16), None: None}[taken["arguments"][0]]
    taken["arguments"] = (first, *taken["arguments"][1:])
    found = faults(_launch(x, 48), 3, **taken)
    assert found == [] if part is None else any(part in each for each in found), found
