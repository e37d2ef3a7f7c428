from collections.abc import Iterator

import pytest
from support.implementations import ALL, skip_unless_served, threads

from peftkernels import functional


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices here are small: threads only wait for each other, for seconds where the machine is busy."""
    with threads(1):
        yield


@pytest.fixture
def without_direct_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes through the Python function's checks, choice and operators, as on the other implementations."""
    monkeypatch.setattr(functional, "_direct_call", functional._leave_to_python)


@pytest.fixture(params=[*ALL, "cpu-without_direct_call"])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation there is, and the C++ kernels on both ways to them."""
    name, _, fixture = request.param.partition("-")
    skip_unless_served(name)
    if fixture:
        request.getfixturevalue(fixture)
    return name
