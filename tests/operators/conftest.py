import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from support.cases import DTYPES
from support.covering import covering
from support.devices import CPU, device_of
from support.implementations import ALL, refusal, skip_unless_served, threads

from peftkernels.backends import triton
from peftkernels.functional import linear


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices here are small: threads only wait for each other, for seconds where the machine is busy."""
    with threads(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def _products_of_any_width() -> Iterator[None]:
    """Interpreted products have the bits of a GPU's in one respect: those of a column do not depend on its neighbours.

    NumPy's BLAS adds in another order where a matrix is narrower. Sums in float64, rounded once, show no order.
    """
    if not triton.interpreting() or refusal("triton") is not None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(builder: Any, a: Any, b: Any, sums: Any, *precision: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(sums.data.dtype)
        return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture
def without_direct_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes through the Python function's checks, choice and operators, as on the other implementations."""
    monkeypatch.setattr(linear, "_direct_call", linear._leave_to_python)


@pytest.fixture(params=ALL)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation there is, and the C++ kernels by the direct call: test_direct_results.py compares the ways.

    The test's tensors are made on the implementation's device.
    """
    name: str = request.param
    skip_unless_served(name, _dtype(request.node))
    device = device_of(name)
    # A device as a context is a mode that overrides functions, and the direct call leaves such calls to Python.
    with nullcontext() if device == CPU else device:
        yield name


def _dtype(item: pytest.Function) -> str:
    """The dtype that a test is parametrised with."""
    for value in item.callspec.params.values():
        name = value.get("dtype") if isinstance(value, dict) else value
        if isinstance(name, str) and name in DTYPES:
            return name
    return "fp32"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where the Triton kernels are interpreted, they run on every pair of a test's parameters, not on all products."""
    if not triton.interpreting() or refusal("triton") is not None:
        return
    by_test: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        if item.callspec.params.get("impl") == "triton" and refusal("triton", _dtype(item)) is None:
            by_test[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for tests in by_test.values():
        kept = covering([{name: repr(value) for name, value in test.callspec.params.items()} for test in tests])
        left_out.update(test for place, test in enumerate(tests) if place not in kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
