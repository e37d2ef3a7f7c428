"""The example of a search over budgets, started as its user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftkernels.allocation.search import BudgetSearch, BudgetSpace

SECONDS = 300


def run_example(request: pytest.FixtureRequest, *arguments: str) -> str:
    root = Path(request.config.rootpath)
    finished = subprocess.run(
        [sys.executable, "-m", "examples.search_budgets", "--quick", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def small(tiny_model: Path, tiny_data: Path) -> list[str]:
    return ["--steps", "8", "--batch-size", "16", "--model", str(tiny_model), "--data", str(tiny_data)]


def test_two_workers_share_a_search(request: pytest.FixtureRequest, small: list[str], tmp_path: Path) -> None:
    storage = str(tmp_path / "search.log")
    # Trainings long enough for the other worker to be there before they are all made.
    more = ["--steps", "80", "--trials", "14", "--workers", "2"]
    printed = run_example(request, *small, "--storage", storage, *more)
    found = re.fullmatch(r"trial (\d+): validation accuracy (\d\.\d+): Candidate\(init_r=\d+, .*\)\n", printed)
    assert found is not None, printed
    study = BudgetSearch(BudgetSpace(), storage=storage).study
    whole = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    # Two that look at the same time may each start what they take for the last trial.
    assert 14 <= len(whole) <= 15
    assert len({trial.user_attrs["worker"] for trial in whole}) == 2
    assert study.best_value == pytest.approx(float(found.group(2)), abs=5e-4)


def test_a_front_of_accuracy_and_parameters(request: pytest.FixtureRequest, small: list[str], tmp_path: Path) -> None:
    storage = str(tmp_path / "search.log")
    printed = run_example(request, *small, "--storage", storage, "--trials", "4", "--front", "--groups")
    lines = printed.splitlines()
    pattern = r"trial \d+: validation accuracy (\d\.\d+), ([\d,]+) ACTIVE parameters: Candidate\(.*'attention'.*\)"
    points = [re.fullmatch(pattern, line) for line in lines]
    assert points and all(points), printed
    parameters = [int(point.group(2).replace(",", "")) for point in points if point]
    assert parameters == sorted(parameters, reverse=True)
