"""Processes that talk over gloo, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(2, tmp_path_factory.mktemp("meetings")) as processes:
        yield processes


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(3, tmp_path_factory.mktemp("meetings-of-three")) as processes:
        yield processes
