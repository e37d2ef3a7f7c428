"""The C++ kernels on processors without AVX-512, which oneDNN and ATen are told to take this one for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.cases import make_call, run
from support.checks import CHECKS, within_budget
from support.implementations import skip_unless_served
from support.oracle import Budget

from peftkernels import explain
from peftkernels.backends.cpu import serving

PROGRAM = """
import sys
import torch

sys.path.insert(0, sys.argv[1])
from support.cases import make_call
from support.checks import CHECKS, within_budget
from support.oracle import Budget
from peftkernels.backends import cpu

torch.set_num_threads(1)
torch.backends.mkldnn.set_flags(sys.argv[2] == "with_onednn")
for name, check in CHECKS.items():
    if name != "subsets":
        check("cpu", 7)
for dtype in ("fp32", "bf16", "bf16-fp32_factors"):
    for leading, n, k, r in (((1,), 67, 33, 3), ((5,), 64, 64, 8), ((2, 131), 129, 771, 17), ((3,), 1, 1, 1)):
        call = make_call(11, leading=leading, n=n, k=k, r=r, plan=True, dropout_p=0.2, dtype=dtype)
        within_budget(call, "cpu")
print(torch.backends.cpu.get_cpu_capability(), cpu.build_facts()["bf16_kernels"])
"""


PORTABLE = {"PEFTKERNELS_CPU_ISA": "portable"}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.parametrize(
    ("environment", "onednn", "expected"),
    [
        ({**PORTABLE, **AVX2}, "with_onednn", " False"),
        ({**PORTABLE, **AVX2, "ATEN_CPU_CAPABILITY": "avx2"}, "with_onednn", "AVX2 False"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "with_onednn", "DEFAULT "),
        (PORTABLE, "without_onednn", " False"),
    ],
    ids=["portable_onednn_avx2", "portable_all_avx2", "aten_default", "portable_without_onednn"],
)
def test_other_instruction_sets(
    environment: dict[str, str], onednn: str, expected: str, request: pytest.FixtureRequest
) -> None:
    """Correct in fp32 and in bf16, where without bf16 instructions a slow loop serves."""
    skip_unless_served("cpu")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(request.config.rootpath / "tests"), onednn],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout.strip() + " "


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "subsets"])
def test_without_onednn(check: str, seed: int) -> None:
    """ATen's kernels alone, switched off while the process runs.

    They choose their instructions by the number of columns, so that the bits of S depend on whether PROBE ranks are
    computed, which they are for ∂gate alone: subsets agree within rounding and not to the bit.
    """
    skip_unless_served("cpu")
    with torch.backends.mkldnn.flags(enabled=False):
        CHECKS[check]("cpu", seed)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors"])
def test_onednn_switched_off_and_on_again(dtype: str, seed: int) -> None:
    """Packs are laid out for the kernels that read them: none is read by the other kind."""
    skip_unless_served("cpu")
    call = make_call(seed, leading=(140,), n=70, k=91, r=5, plan=True, dropout_p=0.2, dtype=dtype)
    budget = Budget(call)
    for enabled in (True, False, True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            excesses = budget.excesses(run(call, "cpu"))
        assert not excesses, f"oneDNN enabled={enabled}: {excesses[0]}"


def test_auto_leaves_bf16_to_the_library_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    skip_unless_served("cpu")
    call = make_call(seed, dtype="bf16")
    monkeypatch.setattr(serving, "_has_bf16_kernels", lambda: False)
    explanation = explain(call.x, call.weight, call.lora_A, call.lora_B)
    assert explanation.chosen == "eager"
    assert "no fast matrix kernels" in explanation.why_not["cpu"]
    within_budget(call, "cpu")
