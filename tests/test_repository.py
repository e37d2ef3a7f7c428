"""What stands in the repository beside code: the workflow, the citation, and what `make help` shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peftkernels

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).parents[1]


def test_the_workflow_runs_what_a_developer_runs() -> None:
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    checkout, python, command = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@") and command == {"run": ".ci/run"}
    assert f"on Python {python['with']['python-version']}," in (ROOT / "constraints.txt").read_text()
    run = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", run, re.MULTILINE) == ["lint", "house", "docs", "test", "smoke"]


def test_the_citation_names_this_release_and_its_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == peftkernels.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{citation["license"]}"' in pyproject


def test_help_shows_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    assert set(targets[1].split()) == set(re.findall(r"^([a-z]+):.*##", makefile, re.MULTILINE))
