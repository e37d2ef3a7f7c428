"""The shipped kernels, compiled beside the other tests, most of which take one processor: it lasts minutes."""

from __future__ import annotations

import os

import pytest

from compile_only.resources import Measuring, Resources

_MEASURING = pytest.StashKey[Measuring]()


def _waits_for_kernels(item: pytest.Item) -> bool:
    return "shipped_kernels" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the kernels comes last."""
    items.sort(key=_waits_for_kernels)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start compiling, where a test will ask for it, with less priority than the tests that run meanwhile."""
    if not session.config.option.collectonly and any(map(_waits_for_kernels, session.items)):
        processes = min(os.cpu_count() or 1, 8)
        session.config.stash[_MEASURING] = Measuring(processes=processes, priority=5)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _MEASURING in config.stash:
        config.stash[_MEASURING].end()


@pytest.fixture(scope="session")
def shipped_kernels(request: pytest.FixtureRequest) -> list[Resources]:
    """What every shipped kernel takes on every architecture."""
    return request.config.stash[_MEASURING].results()
