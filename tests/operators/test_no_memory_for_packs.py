"""A process whose address space has no room for a pack: "auto" runs without one, and says why."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.implementations import skip_unless_served

PROGRAM = """
import resource

import torch

from peftkernels import explain, lora_linear
from peftkernels.backends import cpu

torch.set_num_threads(1)
N, K, R = 2048, 2048, 4
x, weight = torch.randn(3, K, requires_grad=True), torch.randn(N, K) / 45
lora_A, lora_B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)


def step(impl):
    y = lora_linear(x, weight, lora_A, lora_B, impl=impl)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, lora_A, lora_B))]


def right(impl, expected):
    for found, exact in zip(step(impl), expected):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def limit(packs):
    # So many packs' bytes more than the process has now, and half a pack for results and working memory.
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    pack = 4 * N * K
    least = resource.RLIM_INFINITY if packs is None else taken + int((packs + 0.5) * pack)
    resource.setrlimit(resource.RLIMIT_AS, (least, resource.RLIM_INFINITY))


expected = step("eager")
small = x[:, :64].detach(), torch.randn(64, 64), lora_A[:, :64].detach(), lora_B[:64].detach()
lora_linear(*small, impl="cpu")  # loads the kernels, and the next lines what else is imported when it is called
explain(*small)
right("eager", expected)
limit({room})
for _ in range(40):
    right("auto", expected)
explanation = explain(x, weight, lora_A, lora_B)
assert explanation.chosen == "eager", explanation
assert "the system gave no memory to keep this weight packed" in explanation.why_not["cpu"], explanation
for _ in range(3):
    right("cpu", expected)  # is not replaced: packs panel by panel
assert cpu.pack_cache_stats()["refused"] == 1
limit(None)
for _ in range(17):
    right("auto", expected)
assert explain(x, weight, lora_A, lora_B).chosen == "cpu"
assert cpu.pack_cache_stats()["refused"] == 0
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited and measured as Linux does")
@pytest.mark.parametrize("room", [0, 1], ids=["no_pack", "one_of_two_packs"])
def test_calls_go_on_without_packs(room: int) -> None:
    skip_unless_served("cpu")
    program = PROGRAM.replace("{room}", str(room))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "done", f"exit code {done.returncode}:\n{done.stderr[-2000:]}"
