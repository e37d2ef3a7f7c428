"""The same bits again and again: repeated, from two Python threads, on two streams at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.cases import Call, Outcome, make_call, run
from support.implementations import served
from support.routes import choices, representative

from peftkernels.backends.triton.common import launch
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import Choice

SIZES: dict[str, dict[str, Any]] = {
    "small": {"leading": (37,), "n": 48, "k": 112},
    "one_row": {"leading": (1,), "n": 1040, "k": 528},
    "many_tiles": {"leading": (1500,), "n": 1040, "k": 1040},
}
in_every_size = pytest.mark.parametrize(
    "size", [pytest.param(name, marks=() if name == "small" else pytest.mark.gpu) for name in SIZES]
)


def _call(seed: int, size: str, **changes: Any) -> Call:
    (dtype, *_) = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))
    return make_call(seed, dtype=dtype, r=21, plan=True, dropout_p=0.2, scaling="tensor", **SIZES[size], **changes)


def _ways(call: Call) -> list[Choice]:
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[call.x.dtype]
    possible = choices(dtype, call.x.shape[0], *call.weight.shape)
    return [Choice(routes.LIBRARY), *(choice for choice in representative(dtype).values() if choice in possible)]


def _assert_same(found: Outcome, expected: Outcome, what: str) -> None:
    for name, value in expected.named().items():
        assert torch.equal(found.named()[name], value), f"{what}: {name} differs"


@in_every_size
def test_repeated_calls(device: torch.device, size: str, seed: int) -> None:
    call = _call(seed, size).on(device)
    for way in _ways(call):
        with routes.forced(way):
            expected = run(call, "triton")
            for turn in range(20 if device.type == "cuda" else 2):
                _assert_same(run(call, "triton"), expected, f"{way}, {call.label}, run {turn}")


@pytest.mark.gpu
@in_every_size
def test_launches_that_overlap(device: torch.device, size: str, seed: int) -> None:
    """A kernel that begins beside the one before it takes nothing that is not written yet."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("launches overlap from compute capability 9.0 on")
    call = _call(seed, size).on(device)
    for way in _ways(call):
        with routes.forced(way):
            with launch.without_overlap():
                expected = run(call, "triton")
            for turn in range(20):
                _assert_same(run(call, "triton"), expected, f"{way}, {call.label}, run {turn}")


@pytest.mark.gpu
@in_every_size
@pytest.mark.parametrize("how", ["threads", "streams"])
def test_two_at_once(device: torch.device, size: str, how: str, seed: int) -> None:
    """Neither scratch memory nor counters of one call reach another that runs at the same time."""
    calls = [_call(seed + place, size).on(device) for place in range(2)]
    at_once: Callable[[list[Call]], list[list[Outcome]]] = _in_threads if how == "threads" else _on_streams
    for way in _ways(calls[0]):
        with routes.forced(way):
            expected = [run(call, "triton") for call in calls]
            torch.cuda.synchronize(device)
            for place, outcomes in enumerate(at_once(calls)):
                for outcome in outcomes:
                    _assert_same(outcome, expected[place], f"{way}, {how}, {calls[place].label}")


def _in_threads(calls: list[Call]) -> list[list[Outcome]]:
    """Each thread calls on a stream of its own."""
    device = calls[0].x.device

    def serve(call: Call) -> list[Outcome]:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            outcomes = [run(call, "triton") for _ in range(20)]
        stream.synchronize()
        return outcomes

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(serve, calls))


def _on_streams(calls: list[Call]) -> list[list[Outcome]]:
    """One thread feeds two streams in turn and waits for neither."""
    device = calls[0].x.device
    streams = [torch.cuda.Stream(device) for _ in calls]
    found: list[list[Outcome]] = [[] for _ in calls]
    for stream in streams:
        stream.wait_stream(torch.cuda.default_stream(device))
    for _ in range(20):
        for place, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[place].append(run(call, "triton"))
    torch.cuda.synchronize(device)
    return found
