"""One thread: matrices are small here, and threads wait for each other where the machine is busy."""

from collections.abc import Iterator

import pytest
from support.implementations import threads


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
