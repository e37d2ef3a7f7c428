"""Where Triton's allocation kernels run here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.devices import device_of
from support.implementations import skip_unless_served
from support.memory import poison


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """A GPU, or the CPU where kernels are interpreted; what `torch.empty` returns there is NaN."""
    skip_unless_served("triton")
    device = device_of("triton")
    with poison(device):
        yield device
