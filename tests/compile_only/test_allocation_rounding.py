"""In the kernel that keeps the allocator's averages no product joins an addition: each is rounded on its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from compile_only.resources import ARCHITECTURES, Capability

pytest.importorskip("triton", reason="Triton is not installed")

# In a process of its own, since this one may interpret: PTX of the pass with Triton's option off, as shipped, and on.
COMPILE = """
import json, sys
import torch
from peftkernels.backends.triton.allocation import averages
from peftkernels.backends.triton.common.launch import Variant
shipped = averages.update_variant(torch.float32, torch.float32, averages.narrow(12), True, True)
fused = Variant(
    shipped.function, shipped.types, shipped.constants, aligned=shipped.aligned,
    options={**shipped.options, "enable_fp_fusion": True},
)
capability = tuple(json.loads(sys.argv[1]))
print(json.dumps([variant.compile(capability).asm["ptx"] for variant in (shipped, fused)]))
"""


def _arithmetic(ptx: str) -> Counter[str]:
    """Floating-point multiplications, additions, subtractions and their fusions, by instruction."""
    return Counter(re.findall(r"\b(?:mul|add|sub|fma|mad)(?:\.[a-z]+)*\.(?:f32x2|f32|f64)\b", ptx))


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda one: f"sm_{one[0]}{one[1]}")
def test_averages_round_every_operation(capability: Capability) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", COMPILE, json.dumps(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shipped, fused = map(_arithmetic, json.loads(done.stdout))
    # Without ".rn" the assembler may fuse what the compiler did not.
    assert shipped and all(".rn." in instruction for instruction in shipped), shipped
    assert not [instruction for instruction in shipped if instruction.startswith(("fma", "mad"))], shipped
    # p·g, two products for each average, Ī·Ū; a sum for each average, a difference, the tree of sums.
    products = sum(count for instruction, count in shipped.items() if instruction.startswith("mul"))
    additions = sum(count for instruction, count in shipped.items() if instruction.startswith(("add", "sub")))
    assert products >= 6 and additions >= 4
    # With the option on there is something to fuse.
    assert any(".rn." not in instruction or instruction.startswith("fma") for instruction in fused), fused
