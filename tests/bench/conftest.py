"""One thread: matrices are small here, and threads wait for each other where the machine is busy. Few inputs."""

from collections.abc import Iterator

import pytest
from support.implementations import threads

from bench import data


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs fill twice the last-level cache; drawing so many random numbers takes longer than the tests."""
    monkeypatch.setattr(data, "last_level_cache", lambda: 1 << 20)
