"""`python -m bench` from its arguments to its files, on a case that takes no time."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_up
import pytest

from bench import cases, command, job, lineup, replay, roofline, runner
from bench.cases import BACKWARD, FORWARD, GROUPS, Case
from bench.command import main
from bench.verify import WrongResultError

TINY = (Case(direction=FORWARD, K=64, N=48, M=8, r=4), Case(direction=BACKWARD, K=64, N=48, M=8, r=4))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "tiny", TINY)
    monkeypatch.setattr(cases, "QUICK", TINY)
    monkeypatch.setattr(job, "QUICK", TINY)
    monkeypatch.setattr(roofline, "measure_peaks", lambda: roofline.ASSUMED)


def test_only_the_product_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    setuptools = pytest.importorskip("setuptools", reason="finding packages as a build does needs setuptools")
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_namespace_packages(str(root), **settings)
    assert "peftkernels.cli" in found
    assert {name.partition(".")[0] for name in found} == {"peftkernels"}


def test_list_names_cases_groups_and_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {case.id}\n" in out for case in cases.all_cases())
    assert "groups: grid-fp32, grid-bf16, grid-mixed" in out and " min\n" in out
    assert main(["--list", "tiny"]) == 0
    assert capsys.readouterr().out.count(" s  ") == 2


@pytest.mark.alone
def test_quick_measures_keeps_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--seconds", "0.05", "--threads", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json", str(tmp_path / "first.json")]) == 0
    shown = capsys.readouterr()
    assert TINY[0].id in shown.out and "× peftkernels" in shown.out and "written: " in shown.out
    assert "2 cases, about" in shown.err and f"[2/2, 0 s left] {TINY[1].id}: library GEMM + addmm" in shown.err
    (found,) = (tmp_path / "out").glob("*1-threads.csv")
    with found.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["contestant"]) for row in rows] == [
        (case.id, name) for case in TINY for name in lineup.contestants(case)
    ]
    assert all(float(row["median_us"]) > 0 and row["threads"] == "1" for row in rows)

    entries = json.loads((tmp_path / "first.json").read_text())["benchmarks"]
    by_name = {(row["id"], row["contestant"]): row for row in rows}
    assert len(entries) == len(rows)
    for entry in entries:
        row = by_name[entry["group"], entry["params"]["contestant"]]
        assert entry["stats"]["rounds"] == int(row["rounds"])
        assert 1e6 * entry["stats"]["median"] == pytest.approx(float(row["median_us"]), abs=0.006)
        assert entry["extra_info"]["ratio"] == float(row["ratio"])

    before = found.read_text().splitlines()
    again = ["--compare", str(tmp_path / "first.json")]
    assert main([*arguments, *again, TINY[1].id]) == 0
    out = capsys.readouterr().out
    assert "(first)" in out or "(NOW)" in out
    after = found.read_text().splitlines()
    untouched = [line for line in before if line.startswith(TINY[0].id)]
    assert untouched == [line for line in after if line.startswith(TINY[0].id)] and len(after) == len(before)


@pytest.mark.alone
def test_replayed_numbers_are_the_recorded_ones(tmp_path: Path) -> None:
    measured = [made_up.measured(case) for case in TINY]
    replay.replay(measured, json=tmp_path / "replayed.json")
    entries = json.loads((tmp_path / "replayed.json").read_text())["benchmarks"]
    found = {(e["group"], e["params"]["contestant"]): e["stats"]["data"] for e in entries}
    for item in measured:
        for name in item.samples.rounds[0]:
            assert found[item.case.id, name] == item.samples.times(name)
    assert [path.name for path in tmp_path.iterdir()] == ["replayed.json"]


def test_the_cases_are_pytest_benchmark_entries_by_themselves(tmp_path: Path) -> None:
    options = ["--collect-only", "-q", "-k", "allocator/36-modules", f"--benchmark-storage={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(replay.TESTS), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=replay.TESTS.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in lineup.contestants(GROUPS["allocator"][0]):
        assert f"[allocator/36-modules/768x768/r12/{name}]" in done.stdout


def test_an_interrupted_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake_measurements(monkeypatch, KeyboardInterrupt())
    assert main(["--out", str(tmp_path), "tiny"]) == 130
    shown = capsys.readouterr()
    assert "interrupted; 1 of 2 cases are measured and kept" in shown.err and TINY[0].id in shown.out
    (found,) = tmp_path.iterdir()
    assert {line.split(",")[0] for line in found.read_text().splitlines()[1:]} == {TINY[0].id}


def test_a_wrong_result_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake_measurements(monkeypatch, WrongResultError("case: y is wrong"))
    assert main(["--out", str(tmp_path), "tiny"]) == 1
    assert "python -m bench: wrong result: case: y is wrong" in capsys.readouterr().err


def _fake_measurements(monkeypatch: pytest.MonkeyPatch, second: BaseException) -> None:
    def measure(case: Case, *_: Any) -> runner.Measured:
        if case == TINY[1]:
            raise second
        return made_up.measured(case)

    monkeypatch.setattr(runner, "measure_case", measure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-like-it"], "CASE: no case 'nothing-like-it'; expected a part of an id, a glob over ids, or a group"),
        (["--compare", "{tmp}/none.json"], "none.json: no such file"),
        (["--compare", "{tmp}/odd.json"], "odd.json: found no pytest-benchmark results"),
        (["--json", "{tmp}"], "--json: {tmp}: found a folder, expected the name of a file"),
        (["--out", "{tmp}/odd.json"], "--out: {tmp}/odd.json: cannot be made a folder"),
        (["--out", "{tmp}/old"], "its columns are not those of this version"),
    ],
)
def test_wrong_input_is_named_before_anything_is_measured(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bench import results

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "measure_case", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "odd.json").write_text('{"benchmarks": []}')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / results.file_name()).write_text("K,N\n1,2\n")
    cases_named = [] if "nothing-like-it" in arguments else ["tiny"]
    assert main([*cases_named, *(text.replace("{tmp}", str(tmp_path)) for text in arguments)]) == 2
    assert message.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "soon"], ["--threads", "0"], ["--quick", "--full"]]
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_missing_packages_are_named_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sound = command.importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name in ("peft", "pygal") else sound(name)
    )
    assert main(["--list"]) == 2
    shown = capsys.readouterr()
    assert "not installed: peft; install" in shown.err and "'.[bench]'" in shown.err and not shown.out
    assert main(["--histogram", "x"]) == 2
    assert "not installed: peft, pygal;" in capsys.readouterr().err
