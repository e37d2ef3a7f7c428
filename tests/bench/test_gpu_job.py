"""A run on a device that the test decides about: what is kept, what fails, what is said, and the exit code."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch

from bench import lineup, results
from bench.cases import BACKWARD, ENQUEUE, FORWARD, GRAPH, Case
from bench.gpu import __main__ as command
from bench.gpu import cases as registry
from bench.gpu import check, job
from bench.gpu import device as devices
from bench.gpu.budget import Budget
from bench.gpu.cases import SMOKE, contestants, in_order
from bench.gpu.device import Host
from bench.gpu.job import Found, Lineup, Outcome
from bench.runner import Measured
from bench.verify import WrongResultError
from peftkernels.cli.timing import Effort, Samples

HOST = Host(torch.device("cpu"))
SMALL = {"K": 32, "N": 24, "M": 5, "r": 4, "dtype": "bf16", "bias": False}
CASES = [
    ("gpu-grid", Case(direction=FORWARD, **SMALL)),
    ("gpu-grid", Case(direction=BACKWARD, **SMALL)),
    ("gpu-graph", Case(direction=BACKWARD, timing=GRAPH, **SMALL)),
    ("gpu-enqueue", Case(direction=FORWARD, timing=ENQUEUE, **SMALL)),
]
BRIEF = Effort(0.0, 3, 0.3)


def _run(tmp_path: Path, said: list[str], limit: float | None = None) -> Found:
    budget = Budget(limit, HOST.peaks(), 0.01)
    return job.run(
        CASES, HOST, budget, made_up.ORIGIN, Lineup(True, False, "eager"), tmp_path / "found.csv", say=said.append
    )


def _measured(case: Case, ours: float = 1.02) -> Measured:
    names = contestants(case)
    shares = dict.fromkeys(names, 1.5) | {lineup.FROZEN: 1.0, lineup.OURS: ours}
    rounds = tuple({name: share * speed * 1e-4 for name, share in shares.items()} for speed in (1, 2, 4))
    samples = Samples(names[0], rounds)
    origin = replace(made_up.ORIGIN, device="NVIDIA H200")
    return Measured(case, samples, results.rows_of(case, samples, {}, {}, origin, "gpu-grid"))


@pytest.mark.alone
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_case_is_verified_and_timed(number: int) -> None:
    group, case = CASES[number]
    outcome = job.measure_case(
        case, group, BRIEF, HOST, HOST.peaks(), made_up.ORIGIN, Lineup(True, False, "eager"), turn_seconds=1e-5
    )
    rows = outcome.measured.rows
    assert [row.contestant for row in rows] == list(contestants(case)) and outcome.served == "eager"
    assert {(row.group, row.timing, row.id) for row in rows} == {(group, case.timing, case.id)}
    assert all(row.median_us > 0 and row.rounds >= 3 for row in rows)
    # What a call keeps is counted where it is called, least times where the device is timed.
    assert (rows[-1].saved_bytes is not None) == (case.trains and not case.timing)
    assert (rows[-1].roofline_percent is None) == (case.timing == ENQUEUE)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_host_is_timed_where_calls_are_enqueued_and_the_device_elsewhere(number: int) -> None:
    watched: set[str] = set()

    class Watched(Host):
        def elapsed(self, work: Any) -> float:
            watched.add("elapsed")
            return super().elapsed(work)

        def enqueued(self, work: Any) -> float:
            watched.add("enqueued")
            return super().elapsed(work)

    group, case = CASES[number]
    device = Watched(torch.device("cpu"))
    job.measure_case(case, group, BRIEF, device, HOST.peaks(), made_up.ORIGIN, Lineup(False, False, "eager"), 1e-5)
    assert watched == {"enqueued" if case.timing == ENQUEUE else "elapsed"}


def test_a_graph_of_many_calls_is_timed_a_call() -> None:
    samples = Samples("frozen", ({"frozen": 8.0, "ours": 4.0}, {"frozen": 16.0, "ours": 24.0}), 3, True)
    found = job.per_call(samples, 8)
    assert found.rounds == ({"frozen": 1.0, "ours": 0.5}, {"frozen": 2.0, "ours": 3.0})
    assert (found.discarded, found.disturbed) == (3, True)


def test_what_was_measured_is_kept_case_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def measure(case: Case, *_: Any, **__: Any) -> Outcome:
        path = tmp_path / "found.csv"
        kept.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return Outcome(_measured(case), "triton; forward library", {lineup.PEFT_LORA_FP32: "it does not fit"})

    monkeypatch.setattr(job, "measure_case", measure)
    said: list[str] = []
    found = _run(tmp_path, said)
    assert kept == sorted(set(kept)) and kept[0] == 0 and len(found.measured) == 4 and not found.failed
    assert results.read(tmp_path / "found.csv") == found.rows
    assert set(found.served.values()) == {"triton; forward library"}
    assert found.left_out[f"{CASES[0][1].id}: {lineup.PEFT_LORA_FP32}"] == "it does not fit"
    assert any(f"{CASES[0][1].id}: 200.0 µs; " in line and f"{lineup.OURS} 1.020" in line for line in said)


def test_failures_are_kept_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [
        WrongResultError("a case: y is wrong"),
        torch.OutOfMemoryError("CUDA out of memory\nmore"),
        ValueError("no"),
    ]

    def measure(case: Case, *_: Any, **__: Any) -> Outcome:
        if errors:
            raise errors.pop(0)
        return Outcome(_measured(case), "triton", {})

    monkeypatch.setattr(job, "measure_case", measure)
    said: list[str] = []
    found = _run(tmp_path, said)
    ids = [case.id for _, case in CASES]
    assert found.failed == {ids[0]: "a case: y is wrong", ids[2]: "ValueError: no"}
    assert found.left_out == {ids[1]: "out of memory: CUDA out of memory"}
    assert [item.case.id for item in found.measured] == ids[3:]
    assert "[1/4] WRONG: a case: y is wrong" in said


def test_a_device_that_no_longer_answers_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Case, *_: Any, **__: Any) -> Outcome:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(job, "measure_case", measure)
    monkeypatch.setattr(job, "answers", lambda device: False)
    found = _run(tmp_path, [])
    assert set(found.failed) == {CASES[0][1].id, "device"} and len(found.left_out) == 3


def test_time_that_runs_out_leaves_out_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "measure_case", lambda case, *_, **__: Outcome(_measured(case), "triton", {}))
    found = _run(tmp_path, [], limit=1e-9)
    assert not found.measured and not found.failed
    assert found.left_out == {case.id: "time ran out" for _, case in CASES}


ARGUMENTS = ["--smoke", "--device", "cpu", "--impl", "eager"]


def test_a_smoke_run_from_its_options_to_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*ARGUMENTS, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"smoke-run-on-the-cpu.csv", "results.json"}
    with (tmp_path / "out" / "smoke-run-on-the-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(case.id, name) for _, case in in_order(SMOKE) for name in contestants(case)]
    assert [(row["id"], row["contestant"]) for row in rows] == expected
    assert {row["device"] for row in rows} == {HOST.name}
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["id"], row["contestant"]) for row in content["rows"]] == expected
    assert content["failed"] == content["left_out"] == {} and content["environment"]["device"] == HOST.name
    allocators = {case.id for case in SMOKE["gpu-allocator"]}
    assert {served for name, served in content["served"].items() if name not in allocators} == {"eager"}
    assert all(content["served"][name].startswith("allocation: ") for name in allocators)
    goals = {goal["title"]: goal for goal in content["goals"]}
    assert goals["forward, host time of a call over F.linear's, µs"]["value"] > 0
    assert goals["bf16 forward, over frozen"]["verdict"] == "0 of 0 cases measured"
    # The goals are the last that is printed, measured or not.
    assert out.index("gpu-grid: µs a call") < out.rindex("goals") < out.rindex("bf16 forward, over frozen")
    assert "gpu-enqueue: the host's µs a call" in out and "peft under torch.compile is left out" in out


def test_a_wrong_result_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: Any, **__: Any) -> Outcome:
        raise WrongResultError("it is wrong")

    monkeypatch.setattr(job, "measure_case", wrong)
    assert command.main([*ARGUMENTS, "--out", str(tmp_path), "gpu-mixed"]) == 1
    out = capsys.readouterr().out
    assert "failed: 1 (forward/64x48/M33/r16/mixed/no-bias): it is wrong" in out
    assert json.loads((tmp_path / "results.json").read_text())["failed"]


def test_the_limit_counts_from_the_start_and_leaves_time_for_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[Budget] = []

    def run(cases: Any, device: Any, budget: Budget, *_: Any, **__: Any) -> Found:
        budgets.append(budget)
        return Found()

    monkeypatch.setattr(job, "run", run)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--limit", "100"]
    assert command.main(arguments, started=time.perf_counter() - 30.0) == 0
    (budget,) = budgets
    assert budget.limit == pytest.approx(100 - 30 - command.CLOSING_SECONDS, abs=20) and budget.limit < 70


def test_a_missed_goal_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "measure_case", lambda case, *_, **__: Outcome(_measured(case, 5.0), "triton", {}))
    assert command.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    goals = json.loads((tmp_path / "results.json").read_text())["goals"]
    assert any(goal["verdict"].startswith("missed by ") for goal in goals)


def test_without_peft_its_goals_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = command.missing
    monkeypatch.setattr(
        command, "missing", lambda name: "ImportError: No module named 'peft'" if name == "peft" else sound(name)
    )
    assert command.main([*ARGUMENTS, "--out", str(tmp_path), "gpu-grid"]) == 0
    assert (
        "HF peft is left out, and goals beside it are not measured: it cannot be imported (" in capsys.readouterr().out
    )
    names = {row["contestant"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert names == {lineup.FROZEN, lineup.FLOOR, lineup.OURS}


def test_without_matplotlib_there_are_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "missing", lambda name: "ImportError: none" if name == "matplotlib" else None)
    assert command.main([*ARGUMENTS, "--out", str(tmp_path), "gpu-mixed"]) == 0
    assert "plots are left out: matplotlib cannot be imported (ImportError: none)" in capsys.readouterr().out


def test_a_package_that_is_there_and_broken_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('its libraries do not fit')")
    monkeypatch.syspath_prepend(tmp_path)
    assert command.missing("broken_package") == "RuntimeError: its libraries do not fit"
    assert command.missing("no_such_package") is not None and command.missing("json") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device: cpu is for --smoke, --check and --list"),
        (["--limit", "0"], "found 0, expected a positive number of seconds"),
        (["--seconds", "soon"], "'soon' is not a number"),
        (["--full", "--check"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_no_case_and_no_gpu_are_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*ARGUMENTS, "nothing-like-it"]) == 2
    assert "CASE: no case matches nothing-like-it" in capsys.readouterr().err
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "--device: found no CUDA device" in capsys.readouterr().err


def test_an_interrupted_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert command.main(ARGUMENTS) == 130 and "what was measured is kept" in capsys.readouterr().err


def test_list_prints_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(in_order(registry.GROUPS)) and lines[-1].endswith(" cases")


def test_check_leaves_out_what_is_not_served_and_demands_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--check", "--device", "cpu", "--impl", "eager"]) == 0
    assert capsys.readouterr().out.count("right: ") == len(registry.CHECKED)
    monkeypatch.setattr(check.registry, "refusal", lambda impl, request: "not here")
    assert command.main(["--check", "--device", "cpu", "--impl", "triton"]) == 1
    out = capsys.readouterr().out
    assert out.count(": not here") == len(registry.CHECKED) and "no case was checked" in out


def test_check_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(bench: Any) -> None:
        if bench.case.dropout:
            raise WrongResultError(f"{bench.case.id} is wrong")

    monkeypatch.setattr(check, "verify", wrong)
    assert command.main(["--check", "--device", "cpu", "--impl", "eager"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG: ") == 3 and "right: " in out
