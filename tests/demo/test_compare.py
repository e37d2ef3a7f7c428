"""The comparison of strategies from end to end on a tiny encoder: paired, at equal budget, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from demo.checkpoint import Store
from demo.command import main
from demo.compare import contestants, pool
from demo.compare.contestants import BASELINE, CONTESTANTS
from demo.compare.options import ComparisonOptions
from demo.compare.settings import QUICK, VALIDATION, Setting, Trial
from demo.compare.store import ComparisonStore
from demo.errors import InputError
from demo.options import Options

MATRICES = 12  # six linear modules in each of two layers
# What differs between two comparisons that computed the same.
PASSING = ("date", "seconds", "timing", "trainings")
# Compares as the command does, and kills itself without warning at the n-th training step.
KILLED = """
import os, signal, sys
from demo import runs
from demo.command import main

calls, original = int(sys.argv[1]), runs.Run.step

def counted(*arguments):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

runs.Run.step = counted
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Finished:
    """A finished comparison."""

    out: Path
    printed: str
    comparison: dict[str, Any]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Trainings set the number of threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tiny_data: Path) -> list[str]:
    return ["--batch-size", "16", "--model", str(tiny_model), "--data", str(tiny_data)]


@pytest.fixture(scope="module")
def options(inputs: list[str]) -> list[str]:
    return ["--allocators", "uniform,adalora", "--quick", "--jobs", "1", *inputs]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("comparison") / "out"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.write", printed.append)
        code = main([*options, "--out", str(out)])
    assert code == 0
    return Finished(out, "".join(printed), json.loads((out / "comparison.json").read_text()))


@pytest.fixture(scope="module")
def small(tiny_model: Path, tiny_data: Path) -> Options:
    return Options(steps=12, batch_size=16, max_tokens=16, quick=True, model=tiny_model, data=tiny_data)


def lasting(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison without times of day, of steps and of trainings."""
    kept = {key: value for key, value in comparison.items() if key not in PASSING}
    rows = kept["contestants"].items()
    kept["contestants"] = {
        n: {k: v for k, v in row.items() if not k.startswith("step_") and "seconds" not in k} for n, row in rows
    }
    return kept


def test_every_contestant_has_a_full_row(finished: Finished) -> None:
    rows = finished.comparison["contestants"]
    assert list(rows) == [BASELINE, "uniform", "adalora"]
    for name, row in rows.items():
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
        assert [each["seed"] for each in row["by_seed"]] == [0, 1]
        assert row["step_milliseconds"] > 0 and row["step_ratio_p25"] <= row["step_ratio"] <= row["step_ratio_p75"]
        assert row["mean_loss"]["mean"] > 0
        assert (row["difference"] is None) == (name == BASELINE)
        assert (row["difference_to_uniform"] is None) == (name != "adalora")
    accuracies = {name: [each["accuracy"] for each in row["by_seed"]] for name, row in rows.items()}
    differences = [a - b for a, b in zip(accuracies["adalora"], accuracies[BASELINE], strict=True)]
    assert rows["adalora"]["difference"]["mean"] == pytest.approx(sum(differences) / 2, abs=1e-12)


def test_ranks_and_parameters_are_those_of_the_budget(finished: Finished) -> None:
    head = 32 * 3 + 3
    widths = 2 * (4 * (32 + 32) + 2 * (32 + 64))  # inputs plus outputs of all matrices
    rows = finished.comparison["contestants"]
    assert rows[BASELINE]["live_parameters"] == rows[BASELINE]["trainable_parameters"] == 2 * widths + head
    assert rows["uniform"]["live_parameters"] == 2 * (widths + MATRICES) + head
    for name in ("uniform", "adalora"):
        assert (rows[name]["live_ranks"], rows[name]["total_ranks"]) == (2 * MATRICES, 6 * MATRICES)
        assert rows[name]["trainable_parameters"] == 6 * (widths + MATRICES) + head
        for seed in rows[name]["by_seed"]:
            assert sum(seed["live_ranks_by_module"].values()) == 2 * MATRICES
    assert set(rows["uniform"]["by_seed"][0]["live_ranks_by_module"].values()) == {2}
    assert set(rows["adalora"]["by_seed"][0]["live_ranks_by_module"].values()) != {2}


def test_all_are_tuned_on_the_same_grid_with_other_seeds(finished: Finished) -> None:
    tuning, design = finished.comparison["tuning"], finished.comparison["design"]
    grids = [[(t["learning_rate"], t["scale"]) for t in row["trials"]] for row in tuning.values()]
    assert len(grids) == 3 and all(grid == grids[0] for grid in grids) and len(grids[0]) == 2
    assert not set(design["tuning_seeds"]) & set(finished.comparison["seeds"])
    for row in tuning.values():
        best = max(row["trials"], key=lambda t: t["accuracy"])
        chosen = next(t for t in row["trials"] if {k: t[k] for k in row["chosen"]} == row["chosen"])
        assert chosen["accuracy"] == best["accuracy"]


def test_sensitivity_has_every_point(finished: Finished) -> None:
    sensitivity = finished.comparison["sensitivity"]
    points = {name: [(p["target_rank"], p["delta_t"]) for p in row["points"]] for name, row in sensitivity.items()}
    assert points["adalora"] == points["uniform"] == [(1, 1), (2, 1), (2, 3)]
    assert points[BASELINE] == [(1, 1), (2, 1)]
    for row in sensitivity.values():
        assert all(p["live_ranks"] == p["target_rank"] * MATRICES for p in row["points"])


def test_a_seed_is_the_same_start_for_all(finished: Finished) -> None:
    """Same split, head and first batch, and adapters that add nothing yet: the first loss is the same."""
    first: dict[int, list[float]] = {}
    for path in (finished.out / "runs").glob("*-test-*.json"):
        outcome = json.loads(path.read_text())
        first.setdefault(outcome["trial"]["seed"], []).append(outcome["losses"][0])
    assert set(first) == {0, 1} and min(map(len, first.values())) >= 3
    for losses in first.values():
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert first[0][0] != pytest.approx(first[1][0], rel=1e-6)


def test_table_picture_and_words(finished: Finished) -> None:
    for text in ("rank allocation at equal budget", "against fixed", "24 / 72", "accuracy at (target_r, ΔT)"):
        assert text in finished.printed
    assert "adalora does not beat" in finished.printed or "Better than fixed rank" in finished.printed
    assert matplotlib.image.imread(finished.out / "comparison.png").shape[1] > 1000


@pytest.mark.parametrize("step", [30, 100])
def test_a_killed_comparison_resumes_to_the_same(
    options: list[str], finished: Finished, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(step), *options, "--out", str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert len(kept) == (step - 1) // 12
    assert main([*options, "--out", str(out)]) == 2
    assert "holds an unfinished comparison; continue it with --resume" in capsys.readouterr().err
    assert main([*options, "--out", str(out), "--resume", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert lasting(resumed) == lasting(finished.comparison)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_a_finished_comparison_grows(options: list[str], finished: Finished, tmp_path: Path) -> None:
    """Another strategy and another seed are added; no training is repeated."""
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    for path in [*finished.out.glob("*.json"), *(finished.out / "runs").glob("*.json")]:
        (out / path.relative_to(finished.out)).write_bytes(path.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    more = [option if option != "uniform,adalora" else "uniform,adalora,magnitude" for option in options]
    assert main([*more, "--seeds", "3", "--out", str(out), "--resume"]) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    grown = json.loads((out / "comparison.json").read_text())
    assert list(grown["contestants"]) == [BASELINE, "uniform", "magnitude", "adalora"]
    assert grown["contestants"]["adalora"]["accuracy"]["count"] == 3
    assert grown["contestants"]["adalora"]["by_seed"][:2] == finished.comparison["contestants"]["adalora"]["by_seed"]


def test_jobs_change_nothing_but_time(small: Options, tmp_path: Path) -> None:
    trials = [Trial("adalora", seed, Setting(3e-3, 4.0, 2, 1)) for seed in (0, 1, 2)]
    outcomes = []
    for jobs in (1, 2):
        store = ComparisonStore(tmp_path / str(jobs), {})
        seen: list[int] = []
        pool.run_trials(trials, QUICK, ComparisonOptions(("all",), small, 2, jobs, 1), store, seen.append)
        assert seen == [1, 2, 3]
        outcomes.append([{k: v for k, v in store.finished(t).items() if "seconds" not in k} for t in trials])
    assert outcomes[0] == outcomes[1]
    assert all(outcome["threads"] == 1 for outcome in outcomes[0])


def test_searches_choose_the_same_whatever_is_stored(inputs: list[str], tmp_path: Path) -> None:
    """Those with a search, and those that learn from others, after a resume; who is learned from takes part."""
    given = ["--allocators", "prior,search,pareto", "--quick", "--jobs", "1", *inputs]
    first, again = tmp_path / "first", tmp_path / "again"
    assert main([*given, "--out", str(first)]) == 0
    whole = json.loads((first / "comparison.json").read_text())
    assert list(whole["contestants"]) == [BASELINE, "adalora", "prior", "search", "pareto"]
    (again / "runs").mkdir(parents=True)
    (again / "arguments.json").write_bytes((first / "arguments.json").read_bytes())
    stored = sorted((first / "runs").glob("*.json"))
    for path in stored[::2]:
        (again / "runs" / path.name).write_bytes(path.read_bytes())
    assert main([*given, "--out", str(again), "--resume"]) == 0
    assert sorted(path.name for path in (again / "runs").glob("*.json")) == [path.name for path in stored]
    assert lasting(json.loads((again / "comparison.json").read_text())) == lasting(whole)

    tuning = whole["tuning"]
    # A search may choose another ΔT: what target_r changes is seen at that.
    for row in whole["sensitivity"].values():
        at_chosen = [p["accuracy"] for p in row["points"] if p["delta_t"] == row["delta_t"]]
        assert len(at_chosen) == 2 and row["range_over_target_rank"] == max(at_chosen) - min(at_chosen)
    assert [tuning[name]["method"] for name in tuning] == ["grid", "grid", "grid", "tpe", "nsga2"]
    chosen = Setting(**tuning["adalora"]["setting"])
    assert tuning["prior"]["setting"]["prior"] == Trial("adalora", 1000, chosen, VALIDATION).key
    assert {each["target_rank"] for each in tuning["search"]["trials"]} == {2}
    front = tuning["pareto"]["front"]
    assert [each["live_parameters"] for each in front] == sorted(each["live_parameters"] for each in front)
    assert [each["accuracy"] for each in front] == sorted({each["accuracy"] for each in front})
    assert max(each["accuracy"] for each in tuning["pareto"]["trials"]) == front[-1]["accuracy"]
    assert all(row["live_ranks"] == 2 * MATRICES for row in whole["contestants"].values())


def test_a_search_without_optuna_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"search needs Optuna, which is not installed; pip install 'peftkernels\[search"
    ):
        contestants.choose(["search"])
    assert contestants.choose(["adalora"]) == (BASELINE, "adalora")


def test_a_training_of_another_setting_is_refused(tmp_path: Path) -> None:
    store = ComparisonStore(tmp_path, {})
    wanted = Trial("adalora", 0, Setting(3e-3, 4.0, 2, 1))
    store.path(wanted).parent.mkdir()
    store.path(wanted).write_text(json.dumps({"trial": replace(wanted, seed=1).as_dict()}))
    with pytest.raises(InputError, match=r"--resume: .*: holds the training"):
        store.load(wanted)
    store.path(wanted).write_text("{")
    with pytest.raises(InputError, match="is damaged and cannot be loaded"):
        store.load(wanted)


def test_the_demo_and_the_comparison_name_themselves(tmp_path: Path) -> None:
    for kind, mark in ((Store, "results.json"), (ComparisonStore, "comparison.json")):
        out = tmp_path / mark
        assert kind(out, {}).open(resume=False) is None
        (out / mark).write_text("{}")
        assert kind(out, {}).open(resume=False) == f"replacing the finished {kind.what} in {out}"
        assert not (out / mark).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--allocators", "uniform,adalorra"],
            "--allocators: found unknown strategy 'adalorra'; expected all, or some",
        ),
        (["--allocators", ","], "--allocators: found no strategy; expected all, or some of fixed, uniform"),
        (["--allocators", "all", "--runs", "lora"], "--runs: belongs to the demo"),
        (["--allocators", "all", "--no-peft"], "--no-peft: belongs to the demo"),
        (["--seeds", "3"], "--seeds: belongs to a comparison"),
        (["--jobs", "2"], "--jobs: belongs to a comparison"),
        (["--allocators", "uniform", "--seed", "999"], "--seed: found the seeds 999 to 1000, but 1000 is for tuning"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(["--quick", *inputs, *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"python -m demo: error: {message}" in error
    assert not (tmp_path / "out").exists()
    if "strategy" in message:
        assert all(name in error for name in CONTESTANTS)
