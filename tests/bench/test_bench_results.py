"""The results file: what a row says, what a partial run replaces, what an interrupted write leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made_up
import pytest

from bench import lineup, results
from bench.cases import GROUPS, all_cases
from bench.goals import GOALS, judge
from bench.results import ResultsError
from bench.runner import Store

CASE = GROUPS["grid-fp32"][0]


def test_a_row_holds_medians_ratios_and_the_case() -> None:
    found = made_up.measured(CASE, ours=0.5, peers=1.25)
    by_name = {row.contestant: row for row in found.rows}
    frozen, own, peer = by_name[lineup.FROZEN], by_name[lineup.OURS], by_name[lineup.PEFT_LORA]
    assert (frozen.median_us, frozen.p20_us, frozen.p80_us) == (2000.0, 1400.0, 3200.0)
    assert (own.median_us, own.ratio, own.ratio_p25, own.ratio_p75) == (1000.0, 0.5, 0.5, 0.5)
    assert (peer.ratio, peer.ours_ratio, own.ours_ratio, frozen.ours_ratio) == (1.25, 0.4, 1.0, 0.5)
    assert (own.rounds, own.discarded, own.disturbed) == (3, 1, False)
    assert (own.id, own.group, own.K, own.N, own.M, own.r) == (CASE.id, "grid-fp32", CASE.K, CASE.N, CASE.M, 16)
    assert own.commit == "abc1234"
    (theirs, _) = made_up.measured(GROUPS["allocator"][0]).rows
    assert theirs.contestant == lineup.PEFT_ALLOCATOR and theirs.ratio is None and theirs.ours_ratio == 0.5


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = made_up.rows([CASE, GROUPS["allocator"][0], GROUPS["training"][0], GROUPS["live"][3]])
    results.write(rows, tmp_path / "found.csv")
    assert results.read(tmp_path / "found.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]


def test_a_partial_run_replaces_only_its_own_cases() -> None:
    first, second = GROUPS["grid-fp32"][:2]
    old = made_up.rows([second, first], ours=0.9)
    # A contestant that no longer takes part goes with its case; a case that no longer exists stays.
    old.append(replace(old[-1], contestant="somebody else"))
    gone = replace(old[0], id="a case of another version")
    merged = results.merge([gone, *old], made_up.rows([first], ours=0.5))
    assert {(row.id, row.ratio) for row in merged if row.contestant == lineup.OURS} == {
        (first.id, 0.5),
        (second.id, 0.9),
    }
    assert "somebody else" not in {row.contestant for row in merged}
    order = list(dict.fromkeys(row.id for row in merged))
    assert order == [first.id, second.id, "a case of another version"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.csv"
    store = Store(path)
    store.keep(made_up.rows([CASE]))
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.csv.DictWriter, "writerows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.keep(made_up.rows([GROUPS["grid-fp32"][1]]))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("K,N,M\n1,2,3\n", "its columns are not those of this version"),
        ("", "its columns are not those of this version"),
        (None, "cannot be read as results: .*median_us|could not convert"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "found.csv"
    if content is None:
        results.write(made_up.rows([CASE]), path)
        content = path.read_text().replace("2000.0", "fast")
    path.write_text(content)
    with pytest.raises(ResultsError, match=message):
        results.read(path)


def test_goals_are_judged_on_their_cases() -> None:
    """Cases far below the frozen layer's time reach everything; one bad cell shows where only the worst counts."""
    rows = made_up.rows(all_cases(), ours=0.5)
    fast = [row for row in made_up.rows(all_cases(), ours=0.05) if row.contestant == lineup.PEFT_ALLOCATOR]
    for reached in judge([row for row in rows if row.contestant != lineup.PEFT_ALLOCATOR] + fast):
        # Against contestants that are made up at 1.25 of the frozen layer, 0.5 is 0.4.
        expected = 2.5 if reached.goal.speedup else 0.5 if reached.goal.against == lineup.FROZEN else 0.4
        if reached.goal.against == lineup.PEFT_ALLOCATOR:
            expected = 20.0
        assert reached.holds and reached.value == pytest.approx(expected), reached.goal.title
        assert reached.verdict == "reached" and reached.cells == reached.expected > 0
    cells = {reached.goal.title: reached.cells for reached in judge(rows)}
    assert cells["fp32 forward, over frozen"] == 24 and cells["fp32 forward + backward, over frozen"] == 21

    bad = "forward/768x768/M128/r16/fp32"
    worse = [replace(row, ours_ratio=1.1) if row.id == bad else row for row in rows]
    verdicts = {reached.goal.title: reached for reached in judge(worse)}
    assert verdicts["fp32 forward, over frozen"].holds
    missed = verdicts["fp32 forward, no cell above frozen"]
    assert missed.verdict == "missed by 10.0 %" and (missed.worst, missed.worst_value) == (bad, 1.1)


def test_goals_without_all_their_cases_are_not_judged() -> None:
    assert all(reached.holds is None and reached.value is None for reached in judge([]))
    some = judge(made_up.rows(GROUPS["grid-fp32"][:2]))
    assert all(reached.holds is None for reached in some)
    assert some[0].verdict == f"{some[0].cells} of 24 cases measured" and some[0].cells > 0
    assert len(GOALS) == len(some) >= 10
