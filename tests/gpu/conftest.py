"""Tests that only a GPU can answer. What the interpreter can run of them, on small calls, it runs too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.devices import device_of
from support.implementations import skip_unless_served
from support.memory import poison

HERE = Path(__file__).parent
NO_GPU = "no CUDA device: `bench/run_gpu.sh` runs this on a machine that has one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU every test here is marked `gpu`; without one those so marked are skipped."""
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU for the interpreter."""
    skip_unless_served("triton")
    return device_of("triton")


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """What kernels allocate holds NaN."""
    skip_unless_served("triton")
    with poison(device_of("triton")):
        yield
