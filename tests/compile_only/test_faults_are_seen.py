"""Every fault that a compiled kernel may have is seen, on toy kernels that have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compile_only.ordering import early_faults
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


@pytest.mark.parametrize(
    "capability", [one for one in ARCHITECTURES if one >= (9, 0)], ids=lambda one: f"sm_{one[0]}{one[1]}"
)
@pytest.mark.parametrize(
    ("toy", "expected"),
    [
        ("follower", []),
        ("reads_early", ["reads b before it waits for its predecessor"]),
        ("writes_early", [f"writes before it waits for its predecessor{where}" for where in (": st.", ", in machine")]),
        (
            "never_waits",
            ["reads b before it waits for its predecessor", "writes before it waits for its predecessor: st."],
        ),
    ],
)
def test_what_comes_before_its_predecessor_has_ended_is_seen(
    toys: dict[tuple[str, Capability], Resources], toy: str, expected: list[str], capability: Capability
) -> None:
    faults = toys[toy, capability].faults()
    assert bool(faults) == bool(expected)
    for part in expected:
        assert any(part in fault for fault in faults), faults


def test_an_awaited_argument_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="awaited: found left, expected some of a, b"):
        early_faults("", "", {"a": "*bf16", "b": "i32"}, ["left"])


# As `cuobjdump` lists it: a load behind the wait, which a later assembler might lift above it.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
        /*0010*/              @!P0 BRA 0x50 ;                              /* 0x0000000000008947 */
        /*0020*/                   ACQBULK ;                               /* 0x000000000000782e */
        /*0030*/                   LDG.E R2, desc[UR4][R2.64] ;            /* 0x0000000402027981 */
        /*0040*/                   EXIT ;                                  /* 0x000000000000794d */
        /*0050*/                   {early} ;                               /* 0x0000000000007918 */
        /*0060*/                   BRA 0x20 ;                              /* 0xfffffff000007947 */
"""
PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	@%p1 bra 	$L1;
$L0:
	griddepcontrol.wait ;
	ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	ret;
$L1:
	bra.uni 	$L0;
}
"""


@pytest.mark.parametrize(
    ("early", "expected"),
    [
        ("NOP", []),
        (
            "LDG.E R4, desc[UR4][R2.64]",
            ["reads before it waits for its predecessor: 0 in PTX, 1 in machine code"],
        ),
        ("STG.E desc[UR4][R2.64], R4", ["writes before it waits for its predecessor, in machine code"]),
    ],
)
def test_what_the_assembler_moved_across_the_wait_is_seen(early: str, expected: list[str]) -> None:
    assert early_faults(PTX, LISTING.format(early=early), {"a": "*fp32"}, ["a"]) == expected


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
