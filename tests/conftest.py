"""Fresh random numbers in every run, and how to get the same ones again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Processes that test side by side share the cores, and threads that wait for one keep it busy. torch reads this once.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import torch
from hypothesis import HealthCheck, settings
from support import process_state

# Nothing is looked up on the network; read when Hugging Face's libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

# Without a GPU the Triton kernels run in Triton's interpreter, which Triton takes when it is imported or never.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_RUN_SEED = int(os.environ.get("PEFTKERNELS_TEST_SEED", 0)) or int.from_bytes(os.urandom(4), "little")

# Times vary with what else the machine does; a slow example is no failure.
settings.register_profile(
    "operators",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("operators")


def pytest_report_header() -> str:
    return f"random numbers: PEFTKERNELS_TEST_SEED={_RUN_SEED} repeats this run's"


def pytest_configure() -> None:
    """Processes that test side by side draw from one seed."""
    os.environ["PEFTKERNELS_TEST_SEED"] = str(_RUN_SEED)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of this run and this test, printed when the test fails."""
    digest = hashlib.sha256(f"{_RUN_SEED} {request.node.nodeid}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@pytest.fixture(autouse=True)
def _process_is_left_as_it_was() -> Iterator[None]:
    """Tests run in any order: what one changes for the whole process it puts back."""
    before = process_state.state()
    yield
    process_state.forget_what_was_compiled()
    changed = process_state.changes(before, process_state.state())
    assert not changed, "the test left changed: " + "; ".join(changed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Random numbers without a seed are the same whatever ran before."""
    with process_state.numbers_of(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """Those of a fixture that tests share are the same whichever test is the first."""
    if fixturedef.scope == "function":
        return (yield)
    with process_state.numbers_of(f"{fixturedef.baseid} {fixturedef.argname}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        report.sections.append(("random numbers", f"PEFTKERNELS_TEST_SEED={_RUN_SEED} repeats this test's"))
    return report
