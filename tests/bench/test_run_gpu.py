"""bench/run_gpu.sh: every step of it on the CPU, and how it says what failed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "run_gpu.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script needs bash, which is not here")


def _run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _a_test(folder: Path, body: str) -> Path:
    folder.mkdir()
    path = folder / "test_on_a_gpu.py"
    path.write_text(f"import pytest\n\n@pytest.mark.gpu\ndef test_on_a_gpu():\n    {body}\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: runs on a GPU only\n")
    return path


@pytest.mark.alone
def test_a_smoke_run_goes_through_every_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _run("--smoke", "--tests", _a_test(tmp_path / "tests", "pass"), out)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    steps = ("doctor", "gpu tests", "odd shapes", "calibration", "benchmark")
    places = [text.index(f"== {name}: exit code 0, ") for name in steps]
    assert places == sorted(places)
    assert "1 passed" in text and "right: forward+backward/208x144/M67/r16/fp16/dropout0.1/no-bias by tail:tma-" in text
    assert text.rindex("goals") < text.index("run_gpu: passed in ")
    assert text.endswith("run_gpu: a smoke run: no figure in it says anything about a GPU\n")
    name = "smoke-run-on-the-cpu"
    assert {path.name for path in out.iterdir()} == {f"{name}.csv", f"{name}.json", "results.json", "run.log"}
    assert (out / "run.log").read_text() == text
    assert json.loads((out / "results.json").read_text())["failed"] == {}


FAKE = """#!/usr/bin/env bash
case "$*" in
    -c*) [ "$3" = cuda ] && echo "NVIDIA H200, compute capability 9.0"; exit 0 ;;
    setup.py*) step=BUILD ;;
    *compile_only.resources*) step=KERNELS ;;
    *test_triton_driver.py) step=LAUNCHES ;;
    *--list*) step=CASES ;;
    *" doctor") step=DOCTOR ;;
    "-m pytest"*) step=TESTS ;;
    *--check*) step=CHECK ;;
    "-m bench.tune"*) step=TUNE ;;
    "-m bench.gpu.questions"*) step=QUESTIONS ;;
    "-m bench.gpu"*) step=BENCH ;;
esac
echo "called $step: $* [$PEFTKERNELS_TRITON_TABLES]"
sleep "$(printenv "SLEEP_$step" || echo 0)"
exit "$(printenv "CODE_$step" || echo 0)"
"""
SANITIZER = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do
    [ "$1" != --log-file ] || log=$2
    shift 2
done
echo "$SANITIZER_SAYS" > "$log"
"$@" || exit $?
exit "${CODE_SANITIZER:-0}"
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The script with programs in the place of Python and compute-sanitizer that end as variables say."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in (("fake-python", FAKE), ("compute-sanitizer", SANITIZER), ("a-compiler", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        found = {"PYTHON": str(folder / "fake-python"), "CXX": "a-compiler", "PATH": f"{folder}:{os.environ['PATH']}"}
        return _run(*arguments, tmp_path / "out", **{**found, **variables})

    return run


Fake = Callable[..., subprocess.CompletedProcess[str]]


def test_every_step_is_run_on_a_gpu(fake: Fake, tmp_path: Path) -> None:
    done = fake()
    assert done.returncode == 0, done.stdout + done.stderr
    called = [line for line in done.stdout.splitlines() if line.startswith("called ")]
    assert [line.split(":")[0] for line in called] == [
        f"called {step}" for step in ("BUILD", "DOCTOR", "TESTS", "CHECK", "TUNE", "BENCH")
    ]
    out = tmp_path / "out"
    assert "-m pytest -m gpu" in called[2] and "--smoke" not in done.stdout.replace("[--smoke]", "")
    assert f"-m bench.tune --out {out} --device cuda --limit " in called[4]
    # What is measured uses the table that was measured just before.
    assert f"-m bench.gpu --out {out} --device cuda --limit " in called[5] and called[5].endswith(f"[{out}]")
    assert "copy it from" in done.stdout and done.stdout.endswith(f"results in {out}\n")


@pytest.mark.parametrize(
    ("variables", "failed"),
    [
        ({"CODE_BUILD": "1"}, "the C++ kernels were not built"),
        ({"CODE_DOCTOR": "1"}, "doctor"),
        ({"CODE_TESTS": "1"}, "gpu tests: exit code 1"),
        ({"CODE_TESTS": "5"}, "gpu tests: exit code 5"),
        ({"CODE_CHECK": "1"}, "memory checker: exit code 1"),
        ({"CODE_SANITIZER": "99", "SANITIZER_SAYS": "Invalid __global__ read"}, "memory checker: exit code 99"),
        ({"CODE_TUNE": "1"}, "calibration: exit code 1"),
        ({"CODE_BENCH": "1"}, "benchmark: exit code 1"),
    ],
)
def test_a_failed_step_is_the_exit_code_and_stops_no_other(fake: Fake, variables: dict[str, str], failed: str) -> None:
    done = fake(**variables)
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if "FAILED" in line] == [f"run_gpu: FAILED: {failed}"]
    assert done.stdout.count("\ncalled ") == 6 and "run_gpu: passed" not in done.stdout


def test_what_cannot_be_done_here_is_said_and_fails_nothing(fake: Fake) -> None:
    done = fake(CXX="no-such-compiler", CODE_CHECK="1", SANITIZER_SAYS="Error: Device not supported")
    assert done.returncode == 0, done.stdout
    assert "build: left out, there is no C++ compiler (no-such-compiler)" in done.stdout
    assert "compute-sanitizer does not support this machine, memory accesses were not checked" in done.stdout
    if shutil.which("compute-sanitizer") is None:
        without = fake(PATH=os.environ["PATH"], CXX="no-such-compiler")
        assert without.returncode == 0
        assert "memory checker: compute-sanitizer is not installed, memory accesses were not checked" in without.stdout


def test_no_tests_are_no_failure_of_a_smoke_run_alone(fake: Fake) -> None:
    done = fake("--smoke", CODE_TESTS="5")
    assert done.returncode == 0 and "gpu tests: none were collected in tests/gpu; nothing was tested" in done.stdout
    assert "-m bench.gpu --out" in done.stdout and "--smoke --impl eager" in done.stdout


REHEARSED = ("BUILD", "KERNELS", "LAUNCHES", "CASES", "DOCTOR", "TESTS", "CHECK", "TUNE", "QUESTIONS", "BENCH")


def test_a_rehearsal_goes_through_all_that_needs_no_gpu(fake: Fake) -> None:
    done = fake("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    called = dict(re.findall(r"^called (\w+): (.*)", done.stdout, re.MULTILINE))
    assert tuple(called) == REHEARSED
    assert "setup.py --quiet build --build-base" in called["BUILD"] and "--inplace" not in called["BUILD"]
    assert "compile_only.resources --capability 9.0" in called["KERNELS"]
    assert "--collect-only" in called["TESTS"]
    assert all("--smoke" in called[step] for step in ("TUNE", "QUESTIONS", "BENCH"))
    assert done.stdout.endswith("run_gpu: a rehearsal and a smoke run: no figure in it says anything about a GPU\n")


@pytest.mark.parametrize("failed", REHEARSED)
def test_a_rehearsal_ends_at_the_first_fault(fake: Fake, failed: str) -> None:
    done = fake("--dry-run", **{f"CODE_{failed}": "5"})
    assert done.returncode == 1
    called = re.findall(r"^called (\w+)", done.stdout, re.MULTILINE)
    assert called == list(REHEARSED[: REHEARSED.index(failed) + 1])
    assert done.stdout.count("run_gpu: FAILED: ") == 1


@pytest.mark.parametrize("code", ["0", "1"])
def test_questions_are_a_run_of_their_own(fake: Fake, tmp_path: Path, code: str) -> None:
    done = fake("--questions", CODE_QUESTIONS=code)
    assert done.returncode == int(code)
    (called,) = re.findall(r"^called (.*) \d+ \[", done.stdout, re.MULTILINE)
    assert called == f"QUESTIONS: -m bench.gpu.questions --out {tmp_path / 'out'} --device cuda --limit"
    assert ("run_gpu: FAILED: questions: exit code 1" in done.stdout) == (code == "1")


def test_time_is_kept(fake: Fake) -> None:
    """Tests that hang are stopped, and there is no time left for what follows: it is left out and named."""
    done = fake(SLEEP_TESTS="60", RUN_GPU_SECONDS="8")
    assert done.returncode == 1
    assert "run_gpu: gpu tests was stopped after " in done.stdout
    assert "== memory checker: left out, " in done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("run_gpu: FAILED: ")]
    assert failed[0] == "run_gpu: FAILED: gpu tests: exit code 124"
    assert failed[-1] == "run_gpu: FAILED: benchmark: no time was left for it" and "called BENCH" not in done.stdout


def test_without_a_gpu_nothing_is_started(tmp_path: Path) -> None:
    done = _run(tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "run_gpu: error: torch finds no CUDA device; --smoke runs the same steps on the CPU" in done.stdout
    assert "==" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "found option --quick, expected --smoke, --dry-run, --questions, --tests or --help"),
        (["--dry-run", "--questions"], "--questions: found it beside --smoke or --dry-run"),
        (["--tests"], "--tests: expected a path"),
        (["one", "two"], "found a second folder two, expected one"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_help_is_the_head_of_the_script() -> None:
    done = _run("--help")
    assert done.returncode == 0 and done.stdout.startswith(
        "    bench/run_gpu.sh [--smoke | --dry-run | --questions] [--tests PATH] [OUT_DIR]"
    )
    assert "A missed goal is no failure." in done.stdout and "set -uo" not in done.stdout
