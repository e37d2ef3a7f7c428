"""The file of tested versions: what it holds, and what becomes of it under another Python."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
VERSIONS = runpy.run_path(str(ROOT / ".ci" / "versions.py"))
FROZEN = """\
-e /somewhere/peftkernels
# Editable install with no version control (peftkernels==0.1.0)
numpy==2.4.6
nvidia-cublas==13.1.1.3
pip==23.2.1
torch==2.13.0+cpu
"""


def test_lines_fit_every_build_and_only_the_python_they_were_tested_with() -> None:
    text = VERSIONS["constraints"](FROZEN, {"TORCH": "", "HOLD": "'peft<1'"})
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.endswith("make upgrade HOLD=\"'peft<1'\"") for line in comments)
    lines = [line for line in text.splitlines() if line not in comments]
    assert lines == [f'numpy==2.4.6 ; python_version == "{VERSIONS["PYTHON"]}"', "torch==2.13.0"]
    assert VERSIONS["another_python"](text) is None


def test_another_python_is_told() -> None:
    text = VERSIONS["constraints"](FROZEN, {}).replace(VERSIONS["PYTHON"], "2.7")
    here = f"{VERSIONS['PYTHON']} gets its torch, and the newest releases of all else"
    assert VERSIONS["another_python"](text) == f"constraints.txt is for Python 2.7; {here}"
    assert VERSIONS["another_python"]("") is None


def test_every_package_we_ask_for_has_one_version_that_its_range_allows() -> None:
    # Python 3.10 has no tomllib; a requirement is the only string there that begins with a name and a comparison.
    project = (ROOT / "pyproject.toml").read_text().partition("\n[project.scripts]")[0].partition("\n[project]")[2]
    asked = re.findall(r'"([a-z0-9-]+(?:\[\w+\])?[=<>!~]=?[^"]+)"', project)
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {one.name.lower().replace("_", "-"): one for one in map(Requirement, lines)}
    assert len(tested) == len(lines) > 100
    assert len(asked) > 25
    for wanted in map(Requirement, asked):
        (pin,) = tested[wanted.name.lower()].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), f"{wanted}: {pin}"


@pytest.mark.parametrize("line", ["torch", "triton"])
def test_torch_is_the_same_for_every_python(line: str) -> None:
    assert re.search(rf"^{line}==[0-9.]+$", (ROOT / "constraints.txt").read_text(), re.M)
