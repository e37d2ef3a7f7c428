"""How a form of a kernel is loaded and launched, with a driver that only writes down what it is asked."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftkernels.backends.triton.common import launch
from peftkernels.backends.triton.common.launch import Variant


class _Function:
    """Stands for a function made by `triton.jit`."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "gate_ptr", "M", "BLOCK")


class _Compiled:
    """Stands for machine code; `events` is what was done with it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        self.events.append(("loaded", grid))
        return lambda *arguments: self.events.append(("hooked", grid, arguments))

    def run(self, *arguments: Any) -> None:
        self.events.append(("ran", arguments))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A process with one GPU: its hooks, whether it captures, and what was compiled on it."""
    state = SimpleNamespace(capturing=False, compiled=[], hooks=SimpleNamespace(calls=[]))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 77))
    runtime = SimpleNamespace(launch_enter_hook=state.hooks, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_KERNELS", {})
    fake = SimpleNamespace(knobs=SimpleNamespace(runtime=runtime), runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(launch, "triton", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)

    def compile(self: Variant, capability: tuple[int, int]) -> _Compiled:
        time.sleep(0.02)  # long enough for another thread to come
        state.compiled.append(_Compiled())
        return state.compiled[-1]

    monkeypatch.setattr(Variant, "compile", compile)
    return state


FUNCTION = _Function()


def form(block: int = 64, **changes: Any) -> Variant:
    types = {"x_ptr": "*bf16", "gate_ptr": None, "M": "i32"}
    return Variant(FUNCTION, types, {"BLOCK": block}, **{"aligned": ("x_ptr",), **changes})


def test_names_have_to_be_those_of_the_kernel_in_order() -> None:
    with pytest.raises(TypeError, match=r"kernel: found \['M', 'x_ptr', 'gate_ptr', 'BLOCK'\]"):
        Variant(FUNCTION, {"M": "i32", "x_ptr": "*bf16", "gate_ptr": None}, {"BLOCK": 1})


def test_arguments_then_constants(device: SimpleNamespace) -> None:
    variant = form()
    variant(5, "x", None, 3)
    variant(6, "x", None, 4)
    (compiled,) = device.compiled
    assert [event for event, *_ in compiled.events] == ["loaded", "ran", "ran"]
    assert compiled.events[2][1] == (6, 1, 1, 77, "function", "metadata", None, None, None, "x", None, 4, 64)


def test_a_hook_sees_launches(device: SimpleNamespace) -> None:
    device.hooks.calls.append(print)
    form()(5, "x", None, 3)
    assert device.compiled[0].events[-1] == ("hooked", (5, 1, 1), ("x", None, 3, 64))


def test_forms_that_are_the_same_share_one_module(device: SimpleNamespace) -> None:
    form()(1, "x", None, 1)
    form(label="made elsewhere")(1, "x", None, 1)
    assert len(device.compiled) == 1
    form(block=32)(1, "x", None, 1)
    form(aligned=())(1, "x", None, 1)
    form(options={"num_warps": 8})(1, "x", None, 1)
    assert len(device.compiled) == 4


def test_threads_load_once(device: SimpleNamespace) -> None:
    variants = [form(), form()]
    threads = [threading.Thread(target=variants[place % 2], args=(1, "x", None, 1)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(device.compiled) == 1
    assert sum(event == "ran" for event, *_ in device.compiled[0].events) == 6


def test_a_first_call_within_a_capture_says_what_to_do(device: SimpleNamespace) -> None:
    device.capturing = True
    with pytest.raises(RuntimeError, match="make one call of the same shapes and options before the capture"):
        form()(1, "x", None, 1)
    device.capturing = False
    form()(1, "x", None, 1)
    device.capturing = True
    form()(1, "x", None, 1)
    assert len(device.compiled) == 1


def test_what_failed_to_load_is_tried_again(device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: _Compiled, grid: tuple[int, int, int]) -> Any:
        raise RuntimeError("out of resources")

    with monkeypatch.context() as broken:
        broken.setattr(_Compiled, "__getitem__", fails)
        with pytest.raises(RuntimeError, match="out of resources"):
            form()(1, "x", None, 1)
    form()(1, "x", None, 1)
    assert [event for event, *_ in device.compiled[-1].events] == ["loaded", "ran"]
