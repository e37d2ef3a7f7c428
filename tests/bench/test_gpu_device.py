"""Clocks of a device: events, the host's time, and what is said where there is no GPU."""

from __future__ import annotations

import types

import pytest
import torch

from bench.gpu import device as devices
from bench.gpu.device import Cuda, DeviceError, Host, answers, find
from peftkernels.cli.timing import Effort, interleave


class FakeGpu:
    """Work is enqueued in a microsecond and done when the queue comes to it; events record when they were passed."""

    ENQUEUE = 1e-6

    def __init__(self) -> None:
        self.host = 0.0
        self.done = 0.0
        self.synchronized = 0

    def work(self, seconds: float) -> None:
        self.host += self.ENQUEUE
        self.done = max(self.done, self.host) + seconds

    def synchronize(self, *_: object) -> None:
        self.synchronized += 1
        self.host = max(self.host, self.done)

    def event(self, enable_timing: bool = False) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.passed: float | None = None
        self.waited = False

    def record(self) -> None:
        self.passed = max(self._gpu.done, self._gpu.host)

    def synchronize(self) -> None:
        self.waited = True
        self._gpu.synchronize()

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.waited and self.passed is not None and end.passed is not None
        return 1e3 * (end.passed - self.passed)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: fake.host)
    return fake


CUDA = Cuda(torch.device("cuda", 0), "a GPU", 1 << 20)


def test_events_time_the_device_and_the_host_is_timed_without_it(gpu: FakeGpu) -> None:
    assert CUDA.elapsed(lambda: [gpu.work(0.5) for _ in range(3)]) == pytest.approx(1.5, rel=1e-5)
    assert CUDA.enqueued(lambda: [gpu.work(0.5) for _ in range(3)]) == pytest.approx(3e-6)
    assert gpu.host >= gpu.done, "what was enqueued must not run into what is timed next"


def test_ratios_of_turns_on_the_device(gpu: FakeGpu) -> None:
    """Rounds by events: contestants that the host enqueues alike and that the device takes 1, 2 and 3 ms for."""

    turns: list[int] = []

    class Bench:
        baseline = "frozen"

        def __init__(self) -> None:
            self.contestants = {"frozen": 1e-3, "ours": 2e-3, "peer": 3e-3}

        def prepare(self, name: str) -> None:
            gpu.synchronize()

        def turn(self, name: str, first: int, repeats: int) -> None:
            turns.append(repeats)
            for _ in range(repeats):
                gpu.work(self.contestants[name])

    by_events = interleave(
        Bench(), Effort(0.0, 4, 1.0), clock=lambda: gpu.host, stopwatch=CUDA.elapsed, turn_seconds=8e-3
    )
    assert by_events.ratios("ours", "frozen") == pytest.approx([2.0] * len(by_events.rounds), rel=1e-3)
    assert by_events.times("peer") == pytest.approx([3e-3] * len(by_events.rounds), rel=1e-3)
    # A turn of the frozen layer lasts as long as was asked for, or is of as many calls as were.
    assert turns[-1] == 8
    by_host = interleave(Bench(), Effort(0.0, 4, 1.0), clock=lambda: gpu.host, stopwatch=CUDA.enqueued, repeats=10)
    assert turns[-1] == 10
    assert by_host.ratios("peer", "frozen") == pytest.approx([1.0] * len(by_host.rounds))
    assert by_host.times("ours") == pytest.approx([FakeGpu.ENQUEUE] * len(by_host.rounds))


def test_a_graph_is_warmed_up_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self._name = name

        def __enter__(self) -> None:
            log.append(f"begin {self._name}")

        def __exit__(self, *_: object) -> None:
            log.append(f"end {self._name}")

    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda place: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda which: Context("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Context("graph"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: log.append("replay")))
    replay = CUDA.capture(lambda: log.append("work"))
    warm = ["wait", "begin stream", "work", "work", "end stream", "wait", "synchronize"]
    assert log == [*warm, "begin graph", "work", "end graph"]
    replay()
    assert log[-1] == "replay" and log.count("work") == 3


def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--device: found no CUDA device that torch .*--device cpu --smoke"):
        find("cuda")
    assert isinstance(find("cpu"), Host)


def test_a_gpu_is_found_by_its_name_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = types.SimpleNamespace(name="NVIDIA H200", L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: facts)
    found = find("cuda")
    assert (found.name, found.cache_bytes, found.place.type) == ("NVIDIA H200", 60 << 20, "cuda")
    facts.L2_cache_size = 0
    assert find("cuda").cache_bytes == devices.USUAL_L2_BYTES


def test_a_device_that_refuses_everything_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(torch.device("cpu"))
    assert answers(host)

    def refuse(self: Host) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Host, "synchronize", refuse)
    assert not answers(host)


def test_the_cpu_stands_in_for_a_device() -> None:
    host = Host(torch.device("cpu"))
    assert host.name != "cpu", "results of a smoke run must not look like the CPU's"
    calls: list[int] = []
    replay = host.capture(lambda: calls.append(1))
    replay()
    assert len(calls) == 2 and host.elapsed(lambda: None) >= 0
