"""README and docs: whole programs run, fragments at least parse, files that are named exist, and the site builds."""

from __future__ import annotations

import importlib
import os
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
# A path in the repository, in a page's text.
PATH = re.compile(r"(?<![\w/.-])(?:bench|csrc|demo|docs|examples|peftkernels|tests)/[\w./-]*\w")
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
    pages = {str(case.id).rsplit("-", 1)[0] for case in PROGRAMS}
    assert pages >= {"README.md", *(f"docs/{name}.md" for name in ("operator", "layers", "budgets", "backends"))}


def test_the_readme_is_one_screen_and_a_little() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """With their ending or, where source and header are meant, without; and what a run would write is not there yet."""
    text = re.sub(r"\S*[<…*]\S*", "", page.read_text())
    named = {ROOT / path for path in PATH.findall(text)}
    missing = [str(path) for path in named if not path.exists() and not list(path.parent.glob(f"{path.name}.*"))]
    assert missing == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, warnings being errors."""
    pytest.importorskip("mkdocs", reason="the tools for the site are not installed: make docs")
    built = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={built}"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return built


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    # What a browser loads by itself; a link to a paper is the reader's choice.
    loads = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*="?https?:""")
    assert [page.name for page in pages if loads.search(page.read_text())] == []
    styles = [path for path in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", path.read_text())]
    assert styles == []


MODULES = (
    "",
    ".nn",
    ".allocation",
    ".allocation.strategies",
    ".allocation.search",
    ".distributed",
    ".integrations.peft",
)


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_what_is_public(site: Path, module: str) -> None:
    reference = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    # Those of HF peft stand under the module that they come from; STRATEGIES names the classes that stand there.
    elsewhere = {"__version__", "STRATEGIES"} | ({"apply_to_peft", "revert", "stats"} if not module else set())
    names = set(importlib.import_module(f"peftkernels{module}").__all__) - elsewhere
    assert {name for name in names if f'id="peftkernels{module}.{name}"' not in reference} == set()
