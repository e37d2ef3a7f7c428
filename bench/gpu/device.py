"""What cases run on, and its clocks: a CUDA device timed by events, or the CPU, to exercise the code without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.results import CPU
from bench.roofline import Peaks

# Where the driver does not say how large the L2 is: as large as any so far, so that inputs never fit.
USUAL_L2_BYTES = 128 << 20


class DeviceError(Exception):
    """A device that cannot be used; the message says why."""


class Device(Protocol):
    """A device, and how to wait, to time and to record on it."""

    @property
    def place(self) -> torch.device:
        """What tensors are made on."""

    @property
    def name(self) -> str:
        """As the driver names it."""

    @property
    def cache_bytes(self) -> int:
        """Size of its last cache."""

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""

    def elapsed(self, work: Callable[[], object]) -> float:
        """Seconds from the first to the last thing that the device does for `work`; nothing else must be under way."""

    def enqueued(self, work: Callable[[], object]) -> float:
        """Seconds that the host takes to run `work`, the device's own not waited for."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """What replays `work`; it is run to warm it up first."""

    def peaks(self) -> Peaks:
        """What products and copies reach at most."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA device."""

    place: torch.device
    name: str
    cache_bytes: int

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)

    def elapsed(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def enqueued(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        self.synchronize()
        return seconds

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        # Handles, workspaces and compiled kernels are made on a stream of their own before they may be captured.
        stream = torch.cuda.Stream(self.place)
        stream.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.place).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def peaks(self) -> Peaks:
        """The best of several bf16 and fp32 products 8192³ and 4096³, and of copies of 2 GiB, read and written."""
        flops = {dtype: self._products(dtype, size) for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096))}
        source = torch.randint(1 << 30, (1 << 28,), device=self.place)
        target = torch.empty_like(source)
        rate = 2 * source.nbytes / self._fastest(lambda: target.copy_(source))
        return Peaks(flops, rate, rate)

    def _products(self, dtype: torch.dtype, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.place).to(dtype) for _ in range(2))
        return 2.0 * size**3 / self._fastest(lambda: torch.mm(a, b))

    def _fastest(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        self.synchronize()
        return min(self.elapsed(call) for _ in range(10))


@dataclass(frozen=True)
class Host:
    """The CPU in a device's place: the same code runs, nothing that it measures says anything about a GPU."""

    place: torch.device
    name: str = "smoke run on the CPU"
    cache_bytes: int = 1 << 16

    def synchronize(self) -> None:
        """Nothing runs later than it is called for."""

    def elapsed(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    enqueued = elapsed

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        return work

    def peaks(self) -> Peaks:
        """Made up, as nothing is measured here."""
        return Peaks({torch.bfloat16: 1e12, torch.float32: 1e12}, 1e11, 1e11)


def find(name: str) -> Device:
    """The device "cuda" or "cpu"; raises DeviceError where there is none."""
    if name == CPU:
        return Host(torch.device("cpu"))
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise DeviceError(
            f"--device: found no CUDA device that torch {torch.__version__} ({built}) can use; expected one, or "
            "--device cpu --smoke, which runs the same code on tiny shapes"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(device)
    return Cuda(device, facts.name, int(getattr(facts, "L2_cache_size", 0)) or USUAL_L2_BYTES)


def answers(device: Device) -> bool:
    """Return True if the device still computes: after a fault of a kernel it refuses everything."""
    try:
        torch.ones(1, device=device.place).add_(1)
        device.synchronize()
    except RuntimeError:
        return False
    return True
