"""The shipped kernels, compiled once by as many processes as there are cores: it lasts minutes."""

from __future__ import annotations

import os

import pytest

from compile_only.resources import Resources, measure_all


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing that measures time runs beside the compilers, and they run once however many processes test."""
    for item in items:
        if "shipped_kernels" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def shipped_kernels() -> list[Resources]:
    """What every shipped kernel takes on every architecture."""
    return measure_all(processes=min(os.cpu_count() or 1, 8))
