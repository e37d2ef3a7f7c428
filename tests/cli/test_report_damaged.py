"""A run's folder in which something is damaged: a report, or an error that names the file; never a traceback."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from support.made_up_run import MadeUpRun

from peftkernels.allocation import DecisionLog
from peftkernels.cli.main import main
from peftkernels.cli.report import look, page
from peftkernels.cli.report.look import LIGHT, png
from peftkernels.cli.report.page import _anchors

LOG, ARGUMENTS, RESULTS = "decisions.jsonl", "arguments.json", "results.json"
FOLDERS = 64
WRONG = (None, -1, True, 1.5, "x", [], {}, {"x": 1}, [None], 10**400, 10**30, 1e308, "\ud800", "$x_$", "²", "<b>")


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels are drawn in less time."""
    monkeypatch.setattr(look, "_DOTS_PER_INCH", 20)


def _folder(directory: Path) -> None:
    for name, rollback in (("adalora", (12, 8)), ("other", None)):
        with DecisionLog(directory / "runs" / name / LOG) as log:
            MadeUpRun(modules=3, steps=14, rollback=rollback).feed([log])
    outcome = {"accuracy": 0.5, "milliseconds": 20.0, "losses": [1.0, None, 0.5]}
    (directory / ARGUMENTS).write_text(json.dumps({"--seed": 0, "recipe": {"steps": 14}}))
    (directory / RESULTS).write_text(json.dumps({"date": "today", "runs": {"adalora": outcome}}))


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested containers."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inside for found in [(*place, key), *_places(part, (*place, key))]]


def _changed(content: bytes, draw: random.Random) -> bytes:
    """JSON, or one line of JSON Lines, with one value replaced or left out."""
    lines = content.splitlines(keepends=True) if b'"event"' in content else [content]
    index = draw.choice([0, draw.randrange(len(lines))])
    value = json.loads(lines[index])
    place = draw.choice(_places(value))
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if draw.random() < 0.3:
        del holder[place[-1]]
    else:
        holder[place[-1]] = draw.choice(WRONG)
    lines[index] = json.dumps(value).encode() + b"\n"
    return b"".join(lines)


def _damaged(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(4)
    place = draw.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
    return _changed(content, draw)


def test_damaged_folders_are_reported_or_refused_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    # Pictures take most of the time: every sixteenth folder's are drawn, in one look.
    blank = b"\x89PNG" + bytes(40)
    for turn in range(FOLDERS):
        drawn = turn % 16 == 0
        monkeypatch.setattr(page, "_both", lambda draw, drawn=drawn: (png(draw, LIGHT) if drawn else blank,) * 2)
        draw = random.Random(turn)
        directory = tmp_path / str(turn)
        _folder(directory)
        names = [ARGUMENTS, RESULTS, f"runs/adalora/{LOG}", f"runs/adalora/{LOG}"]
        path = directory / names[turn % 4]
        path.write_bytes(_damaged(path.read_bytes(), draw))
        code = main(["report", str(directory)])
        error = capsys.readouterr().err
        outcomes.append(code)
        if code == 2:
            assert str(path) in error and "Traceback" not in error, f"folder {turn}: {error}"
        else:
            html = (directory / "report" / "index.html").read_text(encoding="utf-8")
            figures = (directory / "report" / "report.json").read_text(encoding="utf-8")
            assert html.endswith("</html>"), turn
            assert "NaN" not in figures and "Infinity" not in figures, turn
    assert outcomes.count(0) > 5 and outcomes.count(2) > 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (RESULTS, b"[" * 100_000, "nested too deep"),
        (RESULTS, b'{"runs": {"adalora": []}}', r"runs['adalora']: found [], expected a JSON object"),
        (RESULTS, b'{"runs": {"adalora": {"accuracy": "good"}}}', r"runs['adalora'].accuracy: found 'good'"),
        (RESULTS, b'{"runs": {"adalora": {"losses": [1, "x"]}}}', r"runs['adalora'].losses[1]: found 'x'"),
        (ARGUMENTS, b"\xff", f"{ARGUMENTS}, line 1: found a byte that is not UTF-8"),
        (f"runs/adalora/{LOG}", b'{"event": "start", "step": "x"}\n', "line 1: step: found 'x'"),
        (f"runs/adalora/{LOG}", b'{"event": "start", "step": 1e400}\n', "line 1: step: found inf"),
    ],
)
def test_the_error_names_file_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    _folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and message in error


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(["report", str(tmp_path), "--out", str(out)]) == 2
        assert f"--out: {out}" in capsys.readouterr().err


def test_many_runs_of_one_name_are_told_apart_in_linear_time() -> None:
    names = [f"run{'-' * number}" for number in range(1, 4001)]
    begin = time.process_time()
    anchors = _anchors(names)
    assert len(set(anchors.values())) == len(names)
    assert time.process_time() - begin < 4
