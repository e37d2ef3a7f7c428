"""Every kernel with every shipped configuration compiles for every architecture it is shipped for, without a fault."""

from __future__ import annotations

import pytest

from compile_only.resources import ARCHITECTURES, Capability, Resources

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda one: f"sm_{one[0]}{one[1]}")
def test_every_shipped_kernel(shipped_kernels: list[Resources], capability: Capability) -> None:
    here = [one for one in shipped_kernels if one.capability == capability]
    assert here, "nothing is shipped"
    faults = [f"{one.variant}: {'; '.join(one.faults())}" for one in here if one.faults()]
    assert not faults, f"{len(faults)} of {len(here)} kernels have faults:\n" + "\n".join(faults)


def test_names_are_unique(shipped_kernels: list[Resources]) -> None:
    """A variant is known by its name in tables and failures."""
    names = [(one.variant, one.capability) for one in shipped_kernels]
    assert len(names) == len(set(names))
