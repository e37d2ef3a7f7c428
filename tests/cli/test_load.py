"""What other processes use of the machine."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from peftkernels.cli import load
from peftkernels.cli.load import ForeignLoad


def test_foreign_load_is_what_the_machine_did_beyond_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([(10.0, 100.0), (13.0, 104.0)])
    own = iter([5.0, 7.0])
    monkeypatch.setattr(load, "_machine_times", lambda: next(machine))
    monkeypatch.setattr(load, "_own_seconds", lambda: next(own))
    with ForeignLoad() as measured:
        pass
    assert measured.share == pytest.approx(0.25)


def test_foreign_load_is_unknown_without_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_machine_times", lambda: None)
    with ForeignLoad() as measured:
        pass
    assert measured.share is None


@pytest.mark.alone
def test_own_and_machine_times_grow_by_the_work_done() -> None:
    machine, own, begin = load._machine_times(), load._own_seconds(), time.process_time()
    while time.process_time() - begin < 0.3:
        math.sqrt(2.0)
    assert load._own_seconds() - own == pytest.approx(time.process_time() - begin, abs=0.05)
    after = load._machine_times()
    if machine is None or after is None:
        assert not Path("/proc/stat").exists()
    else:
        assert after[0] - machine[0] > 0.2
        assert after[1] - machine[1] >= after[0] - machine[0]
