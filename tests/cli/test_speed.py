"""`doctor --speed` times what computes the same, in turns, and says what is left out."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from peftkernels.cli import doctor, speed
from peftkernels.cli.main import main
from peftkernels.cli.speed import DIRECTIONS, EAGER, FROZEN, OURS, PEFT, LayerSpeed, Shape
from peftkernels.cli.timing import Effort

CPU = torch.device("cpu")
SMALL = Shape(5, 48, 40)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small shapes for a moment each, and a doctor that has nothing to find."""
    monkeypatch.setattr(speed, "SHAPES", (SMALL, Shape(1, 32, 64)))
    monkeypatch.setattr(speed, "EFFORT", Effort(0.0, 1, 0.0))
    monkeypatch.setattr(doctor, "backend_status", lambda: {"eager": None})


@pytest.mark.parametrize("trains", [False, True])
def test_contestants_compute_the_same(trains: bool) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    bench = LayerSpeed(SMALL, trains=trains, device=CPU, with_peft=True)
    expected = bench.call(EAGER)
    assert len(expected) == (4 if trains else 1)
    for name in (OURS, PEFT):
        torch.testing.assert_close(bench.call(name), expected)
    assert len(bench.call(FROZEN)) == (2 if trains else 1)
    assert not torch.allclose(bench.call(FROZEN)[0], expected[0])


def test_forward_keeps_nothing_for_backward() -> None:
    bench = LayerSpeed(SMALL, trains=False, device=CPU, with_peft=False)
    assert not any(bench.call(name)[0].requires_grad for name in bench.contestants)


@pytest.mark.usefixtures("quick")
def test_every_shape_is_timed_in_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--speed"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)["speed"]
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", torch.get_num_threads())
    cells = [(row["M"], row["K"], row["N"], row["direction"]) for row in found["rows"]]
    assert cells == [(s.M, s.K, s.N, direction) for s in speed.SHAPES for direction in DIRECTIONS]
    for row in found["rows"]:
        assert row["milliseconds"] > 0 and row["ratios"][FROZEN] == 1
        assert {FROZEN, EAGER, OURS} <= set(row["ratios"]) and all(ratio > 0 for ratio in row["ratios"].values())
    # Nobody looks at standard error here.
    assert shown.err == ""


@pytest.mark.usefixtures("quick")
def test_the_table_follows_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--speed"]) == 0
    report, _, table = capsys.readouterr().out.partition("\nspeed: ")
    assert "can serve calls" in report
    lines = table.splitlines()
    assert lines[1].split("  ")[-1] == OURS and FROZEN in lines[1] and EAGER in lines[1]
    assert lines[2] == "  48 -> 40, 5 rows" and lines[5] == "  32 -> 64, 1 row"
    assert lines[3].startswith("    forward  ") and lines[4].startswith("    forward + backward  ")


def test_a_table_of_known_figures() -> None:
    ratios = {FROZEN: 1.0, EAGER: 1.234, OURS: 0.5}
    row = {"M": 1, "K": 4096, "N": 11008, "milliseconds": 1.5, "ratios": ratios, "rounds": 5}
    found: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "rank": 16,
        "left_out": {PEFT: "peft is not installed"},
        "rows": [
            {**row, "direction": "forward", "disturbed": False},
            {**row, "direction": "forward + backward", "milliseconds": 12.0, "disturbed": True},
        ],
    }
    assert speed.describe(found).splitlines() == [
        "speed: float32, rank 16, 2 threads, medians over rounds that take turns",
        "                               frozen   eager LoRA  peftkernels",
        "  4,096 -> 11,008, 1 row",
        "    forward                  1.500 ms         1.23         0.50",
        "    forward + backward      12.000 ms         1.23         0.50  *",
        "  ratios are to the frozen layer in the same round: 1.00 is what the layer takes without an adapter",
        "  peft LoRA is left out: peft is not installed",
        "  * other processes used the machine in most rounds: not to be relied on",
    ]


@pytest.mark.usefixtures("quick")
def test_without_peft_the_others_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor", "--speed"]) == 0
    table = capsys.readouterr().out.partition("\nspeed: ")[2]
    assert "peft LoRA is left out: peft is not installed" in table
    assert PEFT not in table.splitlines()[1]


def test_a_peft_that_cannot_be_imported_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("made for another torch")

    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(speed.importlib, "import_module", fail)
    assert speed._why_without_peft() == "peft cannot be imported: RuntimeError: made for another torch"


def test_a_package_that_cannot_serve_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "backend_status", lambda: {"eager": None, "cuda": None})
    monkeypatch.setattr(speed, "measure", lambda: pytest.fail("it was timed"))
    assert main(["doctor", "--speed"]) == 1
    assert "CANNOT serve calls" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_terminal_sees_what_is_being_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["doctor", "--speed"]) == 0
    shown = capsys.readouterr().err
    assert "\rspeed 2 of 4: 48 -> 40, 5 rows, forward + backward" in shown
    # The last is wiped out.
    *_, last, blank, rest = shown.split("\r")
    assert last.startswith("speed 4 of 4") and len(blank) == len(last) and not blank.strip() and not rest


def test_a_gpu_is_waited_for_before_and_after_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert speed._synchronised(lambda: order.append("work")) >= 0
    assert order == ["wait", "work", "wait"]
