"""A training that is killed at any step and resumed ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkernels.allocation import read_log

STEPS = 24
RUNS = "lora,adalora,peft-adalora"
# Trains as the command does, and kills itself without warning at the n-th call of the function named.
KILLED = """
import os, signal, sys
from demo import runs
from demo.command import main

where, calls = sys.argv[1], int(sys.argv[2])
owner, name = {"step": (runs.Run, "step"), "replace": (os, "replace")}[where]
original = getattr(owner, name)

def counted(*arguments, **options):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(owner, name, counted)
sys.exit(main(sys.argv[3:]))
"""


def start(options: list[str], where: str = "step", calls: int = 0) -> int:
    """Run the demo in a process of its own, killed at call number ``calls`` (0: never); returns its exit code."""
    process = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(calls), *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(process.stderr)
    return process.returncode


@pytest.fixture(scope="module")
def options(tiny_model: Path, tiny_data: Path) -> list[str]:
    small = ["--quick", "--steps", str(STEPS), "--batch-size", "16", "--threads", "1", "--runs", RUNS]
    return [*small, "--model", str(tiny_model), "--data", str(tiny_data)]


@pytest.fixture(scope="module")
def uninterrupted(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert start([*options, "--out", str(out)]) == 0
    return out


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {name: torch.load(out / "runs" / f"{name}.pt", weights_only=True) for name in RUNS.split(",")}


def assert_same_bits(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same_bits(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(mine, other, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def test_killed_again_and_again_at_random_steps(uninterrupted: Path, options: list[str], tmp_path: Path) -> None:
    draw = random.Random()
    # Before the first checkpoint or after it; then somewhere in the two trainings that decide ranks.
    kills = [("step", draw.randint(2, STEPS)), ("step", draw.randint(STEPS, 2 * STEPS)), ("replace", 2)]
    resume: list[str] = []
    for where, calls in kills:
        assert start([*options, *resume, "--out", str(tmp_path)], where, calls) == -signal.SIGKILL, kills
        resume = ["--resume"]
    assert start([*options, *resume, "--out", str(tmp_path)]) == 0, kills
    expected = records(uninterrupted)
    for name, record in records(tmp_path).items():
        for part in ("weights", "masks", "losses", "total_losses", "live_ranks", "accuracy", "halfway"):
            assert_same_bits(record[part], expected[name][part], f"{name}.{part}, killed at {kills}")
    log = Path("runs", "adalora", "decisions.jsonl")
    assert (tmp_path / log).read_bytes() == (uninterrupted / log).read_bytes(), kills
    assert not (tmp_path / "training.pt").exists()
    assert not list(tmp_path.glob(".*"))


def test_every_training_moved_its_weights(uninterrupted: Path) -> None:
    """Equal bits would prove nothing if nothing had been trained, masked or logged."""
    log = read_log(uninterrupted / "runs" / "adalora" / "decisions.jsonl")
    assert len(log.decisions) > 5
    assert log.rank_pattern() == records(uninterrupted)["adalora"]["masks"]
    losses = [event.details["value"] for event in log.events if event.kind == "loss"]
    assert losses == records(uninterrupted)["adalora"]["losses"]
    for name, record in records(uninterrupted).items():
        assert sum(record["losses"][-5:]) < 0.9 * sum(record["losses"][:5]), name
        if name != "lora":
            kept = [keep for mask in record["masks"].values() for keep in mask]
            assert sum(kept) == 96 < len(kept)


def test_resume_with_other_arguments_is_refused(
    uninterrupted: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from demo.command import main

    threads = torch.get_num_threads()
    try:
        code = main([*options, "--steps", "25", "--resume", "--out", str(uninterrupted)])
    finally:
        torch.set_num_threads(threads)
    assert code == 2
    assert "--resume: --steps is 25, but the training in" in capsys.readouterr().err
