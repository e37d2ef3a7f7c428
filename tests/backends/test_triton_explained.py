"""What is said about the Triton backend: which way a call goes, and why it cannot serve one."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from peftkernels.backends import registry, triton
from peftkernels.backends.triton import serving
from peftkernels.backends.triton.linear import routes
from peftkernels.ops.call import Adapter, Call

ADAPTER = Adapter(torch.empty(8, 4096, device="meta"), torch.empty(11008, 8, device="meta"))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees an H200, as far as it is asked."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    triton._old_gpu.cache_clear()


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_serves_three_dtypes() -> None:
    assert triton.unavailable_reason() is None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert triton.refusal(GPU, dtype) is None
        assert triton.disadvantage(GPU, dtype) is None
    assert "torch.float64" in str(triton.refusal(GPU, torch.float64))
    assert "x is on cpu" in str(triton.refusal(CPU, torch.float32))


@pytest.mark.usefixtures("one_gpu")
def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = triton.refusal(GPU, torch.float16)
    triton._old_gpu.cache_clear()
    assert reason == "NVIDIA H200 has compute capability 7.5, the kernels need 8.0"


@pytest.mark.usefixtures("one_gpu")
def test_amd_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "AMD" in str(triton.refusal(GPU, torch.float16))


def test_interpreted_kernels_are_never_taken_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refusal(CPU, torch.float32) is None
    assert "for tests" in str(triton.disadvantage(CPU, torch.float32))
    assert "multiplies wrongly" in str(triton.refusal(CPU, torch.bfloat16))
    assert "x is on cuda:0" in str(triton.refusal(GPU, torch.float32))


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.0"}, "the interpreter of Triton 3.6.0 breaks with NumPy 2.4.0"),
        ({"triton": "3.6.0+git1", "numpy": "2.5.2"}, "the interpreter of Triton 3.6.0+git1 breaks with NumPy 2.5.2"),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.1", "numpy": "2.10.0"}, None),
        ({"triton": "3.10.0"}, "Triton's interpreter needs numpy, which is not installed"),
    ],
)
def test_an_interpreter_that_breaks_is_refused(
    versions: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton._broken_interpreter.cache_clear()
    reasons = {triton.refusal(CPU, torch.float32), triton.unavailable_reason()}
    # Compiled kernels need no interpreter.
    monkeypatch.delenv("TRITON_INTERPRET")
    compiled = triton.refusal(CPU, torch.float32)
    triton._broken_interpreter.cache_clear()
    assert compiled == "x is on cpu, the Triton kernels run on CUDA devices"
    assert len(reasons) == 1
    reason = reasons.pop()
    assert reason is None if expected is None else expected in str(reason)


def test_both_passes_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(4, 512, 4096, device="meta"), torch.empty(11008, 4096, device="meta")
    words = serving.BACKEND.routes(Call(x.to(torch.bfloat16), weight, ADAPTER))
    assert set(words) == set(routes.DIRECTIONS)
    assert all(route.startswith("library (no product was measured on ") for route in words.values())
    with routes.forced(routes.Choice("tail", "pointer-64x64x64-4w-4s")):
        words = serving.BACKEND.routes(Call(x.to(torch.bfloat16), weight, ADAPTER))
    assert set(words.values()) == {"tail:pointer-64x64x64-4w-4s (forced)"}
    monkeypatch.setattr(registry, "choose", lambda impl, call: "triton")
    measured = dataclasses.replace(serving.BACKEND, routes=lambda call: {"forward": "tail:tile (measured on 'X')"})
    monkeypatch.setitem(registry._BACKENDS, "triton", measured)
    printed = str(registry.explain_choice(Call(x, weight, ADAPTER)))
    assert printed.splitlines() == [
        "lora_linear runs on 'triton'",
        "  forward: tail:tile (measured on 'X')",
        "  not 'cuda': this version of peftkernels has no CUDA C++ kernels",
    ]
