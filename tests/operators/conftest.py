from collections.abc import Iterator

import pytest
import torch
from support.implementations import ALL, skip_unless_served


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices here are small: threads only wait for each other, for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ALL)
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation there is."""
    skip_unless_served(request.param)
    return request.param
