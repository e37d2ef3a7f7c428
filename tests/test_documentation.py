"""The Python code in README and docs: whole programs run, fragments at least parse, and files that are named exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()))
]
# What a program has and a fragment lacks: all its imports, and nothing left out.
PROGRAMS = [case for case in BLOCKS if "import torch\n" in str(case.values[0]) and "..." not in str(case.values[0])]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_parses(block: str) -> None:
    compile(block, "<documentation>", "exec")


@pytest.mark.parametrize("block", PROGRAMS)
def test_programs_run(block: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", block],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_there_are_programs_to_run() -> None:
    assert sum("README.md" in str(case.id) for case in PROGRAMS) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert missing == []
