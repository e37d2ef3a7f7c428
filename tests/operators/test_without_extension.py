"""A package whose C++ extension was not built, or was built for another torch: it runs, and says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = "import sys; sys.modules['peftkernels._C'] = None\n"
MISMATCH = """
import sys, types
extension = types.ModuleType("peftkernels._C")
extension.build_facts = lambda: {"torch": "1.2.3"}
sys.modules["peftkernels._C"] = extension
"""
BROKEN = """
import importlib
real = importlib.import_module
def import_module(name, package=None):
    if name == "peftkernels._C":
        raise ImportError("undefined symbol: _ZN2at4", name=name)
    return real(name, package)
importlib.import_module = import_module
"""
ARGUMENTS = """
import torch
from peftkernels import explain, lora_linear
from peftkernels.backends import cpu
x, weight, lora_A, lora_B = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
"""


def _output(*programs: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "".join(programs)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CAUSES = {
    "not_built": (HIDE, "the C++ extension was not built (no compiler at installation, or installed without torch)"),
    "other_torch": (MISMATCH, "the C++ extension was built for torch 1.2.3, found "),
    "does_not_load": (BROKEN, "the C++ extension does not load with torch "),
}


@pytest.mark.parametrize(("hide", "reason"), CAUSES.values(), ids=CAUSES)
def test_what_runs_and_what_is_said(hide: str, reason: str) -> None:
    """With "auto" eager serves and the reason is told; impl="cpu" and the pack cache raise it; training works."""
    output = _output(
        hide,
        ARGUMENTS,
        """
explanation = explain(x, weight, lora_A, lora_B)
print("chosen:", explanation.chosen)
print("why not:", explanation.why_not["cpu"])
eager = lora_linear(x, weight, lora_A, lora_B, impl="eager")
print("same bits:", torch.equal(lora_linear(x, weight, lora_A, lora_B), eager))
lora_linear(x, weight, lora_A.requires_grad_(), lora_B, dropout_p=0.5).sum().backward()
print("trains:", lora_A.grad.shape)
named = lambda: lora_linear(x, weight, lora_A, lora_B, impl="cpu")
for attempt in (named, cpu.pack_cache_stats, cpu.clear_pack_cache):
    try:
        attempt()
        print("served")
    except RuntimeError as error:
        print("refused:", error)
try:
    torch.ops.peftkernels.lora_linear_fwd.cpu(x, weight, lora_A, lora_B, *[None] * 5, 1.0, None, 0.0, None, False)
    print("served")
except NotImplementedError as error:
    print("no kernel:", str(error).split(chr(10))[0][:60])
""",
    )
    lines = output.splitlines()
    assert lines[0] == "chosen: eager"
    assert lines[1].startswith(f"why not: {reason}")
    assert lines[2] == "same bits: True"
    assert lines[3] == "trains: torch.Size([2, 8])"
    assert lines[4].startswith(f"refused: impl='cpu' cannot serve this call: {reason}")
    assert lines[5].startswith(f"refused: impl='cpu' cannot run: {reason}")
    assert lines[6].startswith(f"refused: impl='cpu' cannot run: {reason}")
    assert lines[7].startswith("no kernel: Could not run 'peftkernels::lora_linear_fwd.cpu'")


def test_compiled_and_reference_calls_need_no_extension() -> None:
    output = _output(
        HIDE,
        ARGUMENTS,
        """
compiled = torch.compile(lambda: lora_linear(x, weight, lora_A, lora_B), fullgraph=True, backend="aot_eager")
print(torch.equal(compiled(), lora_linear(x, weight, lora_A, lora_B)))
torch.testing.assert_close(lora_linear(x, weight, lora_A, lora_B, impl="reference"), compiled())
""",
    )
    assert output.split() == ["True"]
