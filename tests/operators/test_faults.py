"""The checks that the other tests rely on find every fault in a long list, and find none where there is none."""

from __future__ import annotations

import pytest
from support.checks import CHECKS
from support.faults import FAULTS
from support.implementations import ALL, skip_unless_served

from peftkernels.backends import registry


def _first_complaint(impl: str, seed: int) -> str | None:
    """The first check that fails, with what it says."""
    for name, check in CHECKS.items():
        try:
            check(impl, seed)
        except AssertionError as error:
            return f"{name}: {error}"
    return None


@pytest.mark.usefixtures("without_direct_call")
@pytest.mark.parametrize("fault", FAULTS)
# The faults lie outside the kernels, and three implementations are enough to prove the checks.
@pytest.mark.parametrize("impl", [name for name in ALL if name != "triton"])
def test_a_fault_is_caught(impl: str, fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_served(impl)
    monkeypatch.setitem(registry.OPERATORS, impl, FAULTS[fault].wrap(registry.OPERATORS[impl]))
    assert _first_complaint(impl, seed) is not None, f"no check notices: {fault}"


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_fault_nothing_is_caught(impl: str, check: str, seed: int) -> None:
    CHECKS[check](impl, seed)


def test_every_check_is_needed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check notices at least one fault by itself: none of them is idle."""
    noticed = dict.fromkeys(CHECKS, 0)
    operators = registry.OPERATORS["reference"]
    for mutant in FAULTS.values():
        monkeypatch.setitem(registry.OPERATORS, "reference", mutant.wrap(operators))
        for name, check in CHECKS.items():
            try:
                check("reference", seed)
            except AssertionError:
                noticed[name] += 1
    assert all(noticed.values()), noticed
