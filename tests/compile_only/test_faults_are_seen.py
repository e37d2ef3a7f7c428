"""Every fault that a compiled kernel may have is seen, on toy kernels that have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compile_only.resources import ARCHITECTURES, Capability, Resources, measure_all

pytest.importorskip("triton", reason="Triton is not installed")

on_every_architecture = pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda one: f"sm_{one[0]}{one[1]}")

# A toy: the fault that it has on each architecture; None where it has none.
SPILLS = dict.fromkeys(ARCHITECTURES, "spills: ")
SHARED = {
    (8, 0): "bytes of shared memory of at most 166912",
    (9, 0): "bytes of shared memory of at most 232448",
    (10, 0): "bytes of shared memory of at most 232448",
}
NO_WGMMA = {
    (8, 0): None,
    (9, 0): "is meant for wgmma.mma_async and has no matrix instruction",
    (10, 0): "is meant for tcgen05.mma and has no matrix instruction",
}
MISTAKEN = dict.fromkeys(ARCHITECTURES, "does not compile: CompilationError")


@pytest.fixture(scope="module")
def toys() -> dict[tuple[str, Capability], Resources]:
    found = measure_all(variants="compile_only.toys")
    return {(one.variant, one.capability): one for one in found}


@on_every_architecture
def test_a_sound_kernel_has_no_fault(toys: dict[tuple[str, Capability], Resources], capability: Capability) -> None:
    sound = toys["sound", capability]
    assert sound.faults() == []
    assert 16 <= sound.registers <= 255
    assert 0 < sound.shared < ARCHITECTURES[capability].shared
    assert list(sound.instructions) == [ARCHITECTURES[capability].matrix]


@on_every_architecture
@pytest.mark.parametrize(
    ("toy", "expected"),
    [("spills", SPILLS), ("too_much_shared", SHARED), ("no_wgmma", NO_WGMMA), ("mistaken", MISTAKEN)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_seen(
    toys: dict[tuple[str, Capability], Resources],
    toy: str,
    expected: dict[Capability, str | None],
    capability: Capability,
) -> None:
    faults, part = toys[toy, capability].faults(), expected[capability]
    if part is None:
        assert faults == []
    else:
        assert any(part in fault for fault in faults), faults


def test_serialised_wgmma_is_seen(toys: dict[tuple[str, Capability], Resources]) -> None:
    assert any("wgmma.mma_async instructions are serialized" in fault for fault in toys["serialised", (9, 0)].faults())


def test_too_much_tensor_memory_is_seen() -> None:
    """Triton takes what there is and spills the rest: only a made-up kernel can take more."""
    greedy = Resources("greedy", (10, 0), expects_wgmma=False, registers=32, tensor_memory=1024)
    assert greedy.faults() == ["takes 1024 columns of tensor memory of at most 512"]


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was not compiled passes for sound."""
    (tmp_path / "deadly.py").write_text("import os\ndef variants(capability):\n    os._exit(3)\n    yield\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"a process that compiles kernels died \(3\)"):
        measure_all([(8, 0)], "deadly", processes=1)


def test_kernels_are_compiled_where_this_process_interprets(
    toys: dict[tuple[str, Capability], Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (again,) = (one for one in measure_all([(8, 0)], "compile_only.toys", 1) if one.variant == "sound")
    assert again == toys["sound", (8, 0)]
    assert os.environ["TRITON_INTERPRET"] == "1"
