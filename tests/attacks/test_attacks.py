"""A short run of every attack."""

from __future__ import annotations

import pytest

from attacks import ATTACKS
from attacks.attack import load


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused_or_right(name: str, seed: int) -> None:
    attack = load(name)
    counts = attack.run(attack.SHORT, seed)
    print(f"{name}: {counts}")
    assert counts.tried.total() >= attack.SHORT, "the attack tried less than its rounds"
    assert not counts.faults, f"{name}: {counts}"
