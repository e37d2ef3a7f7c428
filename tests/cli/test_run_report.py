"""The report's page: whole by itself, true to the log, and readable whatever the run was like."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from support.made_up_run import MadeUpRun

from peftkernels.allocation import DecisionLog, read_log
from peftkernels.cli.main import main
from peftkernels.cli.report import command, look, words
from peftkernels.cli.report.collect import collect
from peftkernels.cli.report.history import History, common_share
from peftkernels.cli.report.page import _anchors


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels are drawn in less time."""
    monkeypatch.setattr(look, "_DOTS_PER_INCH", 50)


VOID = {"meta", "link", "img", "source", "wbr", "br"}


class Page(HTMLParser):
    """A parsed page: its elements, text, tables and images; fails on elements that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def module_rows(self) -> dict[str, list[str]]:
        """The rows of the tables of modules by module."""
        return {row[0].strip(): [cell.strip() for cell in row] for row in self.rows if len(row) == 7}

    def pictures(self) -> list[bytes]:
        """All images of the page, decoded."""
        sources = [value for _, attrs in self.elements for name, value in attrs.items() if name in ("src", "srcset")]
        prefix = "data:image/png;base64,"
        assert all(source is not None and source.startswith(prefix) for source in sources)
        return [base64.b64decode(str(source)[len(prefix) :], validate=True) for source in sources]

    def lead(self) -> str:
        """The first paragraph after the heading."""
        after = self.text.split("peftkernels report", 1)[1].strip().split("\n")
        return next(line for line in after[1:] if line.strip()).strip()


def report(directory: Path, *options: str) -> Page:
    assert main(["report", str(directory), *options]) == 0
    return Page(directory / "report" / "index.html")


def log_run(path: Path, run: MadeUpRun, **span: Any) -> Path:
    with DecisionLog(path / "decisions.jsonl") as log:
        run.feed([log], **span)
    return path


def check_alone(page: Page, text: str) -> None:
    """Nothing outside the page is named: no address, no file, and images that decode."""
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert re.findall(r"//|url\(|@import|fetch\(|XMLHttp", without_pictures) == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:", "#")), (tag, name, value[:60])
    for picture in page.pictures():
        pixels = matplotlib.image.imread(BytesIO(picture))
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 5


@pytest.mark.parametrize(
    "run",
    [
        MadeUpRun(modules=1, steps=12),
        MadeUpRun(modules=6, steps=20, rollback=(12, 8)),
        MadeUpRun(modules=300, steps=10, rank=8),
    ],
    ids=["one module", "six modules, rolled back", "300 modules"],
)
def test_page_holds_every_module_and_needs_nothing_else(tmp_path: Path, run: MadeUpRun) -> None:
    page = report(log_run(tmp_path, run))
    text = (tmp_path / "report" / "index.html").read_text()
    check_alone(page, text)
    assert len(page.pictures()) == 6  # three, each in a light and a dark look
    log = read_log(tmp_path / "decisions.jsonl")
    rows = page.module_rows()
    assert set(run.names) <= set(rows)
    for name, kept in log.rank_pattern().items():
        assert rows[name][1] == f"{sum(kept)}/{len(kept)}"
    assert f"{int(log.kept[-1].sum()):,} of {log.total_ranks:,}" in page.text
    assert len(text) < 2_500_000


def test_pictures_lie_beside_the_page(tmp_path: Path) -> None:
    page = report(log_run(tmp_path, MadeUpRun()))
    files = {path.name: path.read_bytes() for path in (tmp_path / "report").glob("*.png")}
    name = tmp_path.name
    assert set(files) == {f"{name}-live-ranks.png", f"{name}-budget.png", f"{name}-churn.png"}
    assert set(files.values()) < set(page.pictures())


def test_figures_are_those_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeUpRun(modules=6, steps=20)
    log_run(tmp_path, run)
    assert main(["report", str(tmp_path), "--json", "--out", str(tmp_path / "elsewhere")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "elsewhere" / "report.json").read_text())
    figures = printed["runs"][tmp_path.name]
    log = read_log(tmp_path / "decisions.jsonl")
    before = np.vstack([np.ones((1, 24), dtype=bool), log.kept])
    masked, back = before[:-1] & ~log.kept, log.kept & ~before[:-1]
    assert figures["decisions"]["live"] == log.kept.sum(1).tolist()
    assert figures["decisions"]["masked"] == masked.sum(1).tolist()
    assert figures["decisions"]["revived"] == back.sum(1).tolist()
    assert back.sum() > 5
    for index, module in enumerate(figures["modules"]):
        part = log.part(index)
        assert module["kept"] == log.kept[-1, part].sum()
        assert module["score"] == pytest.approx(log.scores[-1, part].sum())
        assert module["nearest"] == pytest.approx(np.abs(log.scores[-1, part] - log.thresholds[-1, index]).min())
        assert module["revived"] == back[:, part].sum()
        changed = log.steps[(masked | back)[:, part].any(1)]
        assert module["changed"] == (changed[-1] if len(changed) else None)
    assert figures["groups"]["mlp"] == {"live": int(log.kept[-1, 8:12].sum() + log.kept[-1, 20:].sum()), "total": 8}


def test_explanations_agree_with_the_masks(tmp_path: Path) -> None:
    page = report(log_run(tmp_path, MadeUpRun(modules=12, steps=20)))
    log = read_log(tmp_path / "decisions.jsonl")
    rows = page.module_rows()
    for index, module in enumerate(log.modules):
        scores, kept = log.scores[-1, log.part(index)], log.kept[-1, log.part(index)]
        threshold, why = log.thresholds[-1, index], rows[module.name][6]
        if kept.all():
            assert why.startswith("every score is above the threshold, the lowest ")
        elif not kept.any():
            assert why.startswith("no score is above the threshold, the highest ")
        else:
            told = re.match(r"lowest kept ([\d.]+)×", why)
            assert told is not None, why
            assert float(told.group(1)) == pytest.approx(scores[kept].min() / threshold, rel=0.05)


def test_lead_is_two_sentences_that_say_what_happened(tmp_path: Path) -> None:
    lead = report(log_run(tmp_path, MadeUpRun(modules=6, steps=20, rollback=(12, 8)))).lead()
    assert lead.startswith("Of 24 ranks in 6 matrices, AdaLoRA kept 12 (50\N{NO-BREAK SPACE}%) after 20 steps, in 12 ")
    assert lead.endswith("1 step was skipped, the run was rolled back once.")
    assert len(re.findall(r"\.(?: |$)", lead)) == 2


def test_events_are_told_in_order_and_joined(tmp_path: Path) -> None:
    run = MadeUpRun(modules=6, steps=20)
    with DecisionLog(tmp_path / "decisions.jsonl") as log:
        run.feed([log], last=10)
        for step in (11, 12, 13):
            log.on_event(step, "skipped", {"why": "the gradients are not finite"})
        log.on_event(13, "rollback", {"to": 9, "why": "churn <b>above</b> its band"})
        log.on_event(10, "frozen", {"module": run.names[2]})
        log.on_event(12, "moved", {"from": "mlp", "to": "attention", "ranks": 2})
    page = report(tmp_path)
    moments = [(m.when, m.kind, m.text) for m in words.timeline(History(read_log(tmp_path / "decisions.jsonl")))]
    assert moments == [
        ("step 3", "skipped", "scores left as they were: the gradients are not finite"),
        (
            "steps 11–13",
            "skipped",
            "scores left as they were: the gradients are not finite (rolled back later) (3 times)",
        ),
        ("step 13", "rollback", "back to step 9: churn <b>above</b> its band"),
        ("step 10", "frozen", "encoder.layer.0.output.dense is frozen"),
        ("step 12", "moved", "from mlp, to attention, ranks 2"),
    ]
    for when, _, text in moments:
        assert when in page.text
        assert text in page.text
    assert page.module_rows()[run.names[2]][6].startswith("frozen at step 10 with ")
    assert ("b", {}) not in page.elements


def test_nothing_decided_yet(tmp_path: Path) -> None:
    page = report(log_run(tmp_path, MadeUpRun(modules=3, steps=50), last=2))
    check_alone(page, (tmp_path / "report" / "index.html").read_text())
    assert "has not decided anything yet" in page.lead()
    assert {row[6] for name, row in page.module_rows().items() if "layer" in name} == {
        "no decision yet, every rank trains"
    }


def test_a_torn_log_is_reported_on_and_it_is_said(tmp_path: Path) -> None:
    path = log_run(tmp_path, MadeUpRun(modules=3, steps=20)) / "decisions.jsonl"
    whole = report(tmp_path).text
    assert "ends in the middle" not in whole
    path.write_bytes(path.read_bytes()[:-5])
    assert "The log ends in the middle of a line or a decision, which is left out" in report(tmp_path).text


def test_a_log_that_begins_in_the_middle_invents_no_churn(tmp_path: Path) -> None:
    page = report(log_run(tmp_path, MadeUpRun(steps=20), first=9))
    assert "The log begins at step 9; what was decided before is not known." in page.text
    history = History(read_log(tmp_path / "decisions.jsonl"))
    assert (history.masked[0], history.revived[0]) == (0, 0)
    assert history.churn[1:].sum() > 0


def test_thinned_scores_are_explained_at_the_step_they_are_of(tmp_path: Path) -> None:
    with DecisionLog(tmp_path / "decisions.jsonl", every=5) as log:
        MadeUpRun(steps=20).feed([log])
    page = report(tmp_path)
    read = read_log(tmp_path / "decisions.jsonl")
    assert read.steps[-1] == 14
    assert "Scores, margins and reasons are those of step 13, the last logged." in page.text
    for name, kept in read.rank_pattern().items():
        assert page.module_rows()[name][1] == f"{sum(kept)}/4"


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = {"adalora": MadeUpRun(seed=1), "bandit": MadeUpRun(seed=2, strategy="bandit"), "again": MadeUpRun(seed=1)}
    for name, run in runs.items():
        log_run(tmp_path / "runs" / name, run)
    results = {"runs": {"adalora": {"accuracy": 0.75, "milliseconds": 12.0}, "bandit": {"accuracy": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "arguments.json").write_text(json.dumps({"--seed": 7, "--data": "240 texts, abc"}))
    page = report(tmp_path)
    check_alone(page, (tmp_path / "report" / "index.html").read_text())
    assert len(page.pictures()) == 2 * (3 * 3 + 1)
    assert page.lead().startswith("3 runs under AdaLoRA and bandit keep 50\N{NO-BREAK SPACE}% of their ranks.")
    assert "from 0.500 (bandit) to 0.750 (adalora)" in page.lead()
    table = {row[0].strip(): [cell.strip() for cell in row] for row in page.rows if len(row) == 9}
    assert table["adalora"][2] == "12 / 24"
    assert table["adalora"][8] == "0.750"
    assert table["again"][8] == "–"
    shares = common_share([read_log(tmp_path / "runs" / name / "decisions.jsonl").rank_pattern() for name in runs])
    assert shares[0][2] == shares[1][1] == 1.0
    assert shares[0][1] == shares[1][0]
    assert shares[0][1] is not None
    assert 0 < shares[0][1] < 1
    assert "240 texts, abc" in page.text
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = {str(a["href"])[1:] for tag, a in page.elements if tag == "a"}
    assert links == {"adalora", "again", "bandit"} <= targets


def test_names_that_look_alike_as_files_stay_apart(tmp_path: Path) -> None:
    names = ["a b", "a-b"]
    for seed, name in enumerate(names):
        log_run(tmp_path / "runs" / name, MadeUpRun(modules=2, steps=10, seed=seed))
    report(tmp_path)
    assert len(list((tmp_path / "report").glob("*.png"))) == 2 * 3 + 1


def test_a_directory_named_like_its_run_hides_nothing(tmp_path: Path) -> None:
    for directory, modules in (("adalora", 1), ("adalora/runs/adalora", 2)):
        log_run(tmp_path / directory, MadeUpRun(modules=modules))
    assert {name: len(log.modules) for name, log in collect(tmp_path / "adalora").logs.items()} == {
        "adalora/": 1,
        "adalora": 2,
    }


def test_anchors_are_their_own() -> None:
    assert list(_anchors(["a b", "a-b", "together", "…"]).values()) == ["a-b", "a-b-2", "together-2", "run"]


def test_runs_with_other_layers_are_not_compared_rank_by_rank() -> None:
    assert common_share([{"a": [True]}, {"b": [True]}]) == [[1.0, None], [None, 1.0]]


def test_groups_with_thresholds_of_their_own(tmp_path: Path) -> None:
    run = MadeUpRun(modules=3, steps=10)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.on_start(run.facts())
    log.on_decision(
        1,
        6.0,
        [0.2, 0.2, 0.6],
        [[0.1, 0.2, 0.3, 0.4], [0.3] * 4, [0.5, 0.6, 0.7, 0.8]],
        [[False, False, True, True], [True] * 4, [False, False, True, True]],
    )
    log.on_decision(
        2, 6.0, [-math.inf, -math.inf, 0.0], [[1.0] * 4] * 2 + [[0.0] * 4], [[True] * 4, [True] * 4, [False] * 4]
    )
    history = History(read_log(tmp_path / "decisions.jsonl"))
    assert {group: values.tolist() for group, values in history.thresholds.items()} == {
        "attention": [0.2, -math.inf],
        "mlp": [0.6, 0.0],
    }
    rows = report(tmp_path).module_rows()
    assert rows[run.names[0]][6] == "nothing had to be masked"
    assert rows[run.names[2]][6] == "no score is above the threshold, the highest 0"


def test_a_choice_that_the_threshold_does_not_explain_is_not_explained_by_it(tmp_path: Path) -> None:
    run = MadeUpRun(modules=1, strategy="knapsack")
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.on_start(run.facts())
    log.on_decision(1, 2.0, [0.5], [[0.1, 0.4, 0.6, 0.9]], [[True, False, False, True]])
    why = report(tmp_path).module_rows()[run.names[0]][6]
    assert why == "chosen by the strategy's own rule: the threshold alone would choose otherwise"


def test_wrong_input_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(directory: Path, *options: str) -> str:
        assert main(["report", str(directory), *options]) == 2
        assert not (directory / "report").exists()
        return capsys.readouterr().err

    assert "no such directory" in refused(tmp_path / "none")
    assert "found neither decisions.jsonl nor runs/*/decisions.jsonl" in refused(tmp_path)
    path = log_run(tmp_path, MadeUpRun()) / "decisions.jsonl"
    (tmp_path / "file").touch()
    assert "--out: " in refused(tmp_path, "--out", str(tmp_path / "file"))
    (tmp_path / "results.json").write_text("{")
    assert f"{tmp_path / 'results.json'}, line 1: found no JSON" in refused(tmp_path)
    (tmp_path / "results.json").unlink()
    path.write_text(path.read_text().replace('"kept"', '"lost"', 1))
    assert re.search(rf"{path}, line \d+: found kept None", refused(tmp_path))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    message = refused(tmp_path)
    assert "not installed: jinja2, matplotlib" in message
    assert "pip install 'peftkernels[report]'" in message
