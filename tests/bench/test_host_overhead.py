"""The measurement of what Python does between a call and its launches."""

from __future__ import annotations

import pytest

from bench import host_overhead
from peftkernels.backends import triton
from peftkernels.backends.triton.common import launch


def test_launches_are_counted_and_not_made(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host_overhead, "ROUNDS", 1)
    monkeypatch.setattr(host_overhead, "CALLS", 2)
    before = launch.Variant.__call__, triton.refusal
    found = host_overhead.measure()
    assert [(route.partition(":")[0], launches) for route, launches, *_ in found] == [
        ("decode", 1),
        ("tail", 2),
        ("tail", 2),
        ("single", 1),
    ]
    assert all(call > 0 and trained > 0 for _, _, call, trained, _ in found)
    assert (launch.Variant.__call__, triton.refusal) == before
    host_overhead.main()
    assert "launches left out" in capsys.readouterr().out
