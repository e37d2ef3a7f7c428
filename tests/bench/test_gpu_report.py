"""What a GPU's results say: goals, tables and plots, from rows that were never measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import made_up
import pytest

from bench import lineup, report, results
from bench.cases import BACKWARD, ENQUEUE, FORWARD, GRAPH, Case, all_cases
from bench.goals import GPU_GOALS, Reached, judge
from bench.gpu import page as gpu_page
from bench.gpu import plots
from bench.gpu.cases import GROUPS, contestants, in_order
from bench.results import ResultsError, Row
from peftkernels.cli.timing import Samples

CASES = [case for _, case in in_order(GROUPS)]
ORIGIN = replace(made_up.ORIGIN, device="NVIDIA H200")
PEER = lineup.PEFT_LORA_BF16


def _rows(cases: list[Case], ours: Callable[[Case], float], peers: float = 2.0, floor: float = 1.5) -> list[Row]:
    """The frozen layer takes 100 µs, ours as much as the test says, the others a fixed share of it."""
    found = []
    for case in cases:
        names = contestants(case)
        shares = dict.fromkeys(names, peers) | {lineup.FROZEN: 1.0, lineup.FLOOR: floor, lineup.OURS: ours(case)}
        samples = Samples(names[0], tuple({name: share * 1e-4 for name, share in shares.items()} for _ in range(3)))
        found += results.rows_of(case, samples, {}, {}, ORIGIN, "a group")
    return found


def _judged(rows: list[Row]) -> dict[str, Reached]:
    return {reached.goal.title: reached for reached in judge(rows, GPU_GOALS, CASES)}


def test_goals_are_reached_on_all_of_their_cases() -> None:
    judged = _judged(_rows(CASES, lambda case: 1.02))
    # Three rows of seven shapes, and two further ranks at two shapes of two rows: r = 128 is not spoken of.
    assert judged["bf16 forward, over frozen"].cells == 7 * 3 + 2 * 2 * 2
    assert judged[f"bf16 forward, dropout 0.1, times as fast as {PEER}"].cells == 4
    layers = sum(not case.timing and case.operator != "allocator" for case in CASES)
    assert judged[f"never slower than {lineup.FLOOR} (2% for measuring)"].cells == layers
    assert judged["forward, host time of a call over F.linear's, µs"].cells == 3
    assert {reached.verdict for reached in judged.values()} == {"reached"}
    for title, value in (
        ("bf16 forward + backward, no cell above", 1.02),
        (f"bf16 forward + backward, times as fast as {PEER}", 2.0 / 1.02),
        (f"replayed from a graph, never slower than {lineup.FLOOR} (2% for measuring)", 1.02 / 1.5),
        # 2 % of 100 µs.
        ("forward, host time of a call over F.linear's, µs", 2.0),
        # 1.02 of the same.
        ("allocator step, µs", 102.0),
    ):
        assert judged[title].value == pytest.approx(value, abs=1e-3), title


@pytest.mark.parametrize(
    ("spoilt", "missed"),
    [
        (
            lambda c: c.direction == FORWARD and not c.timing and c.M == 8192 and (c.N, c.K, c.r) == (11008, 4096, 16),
            {"bf16 forward, no cell above", "never slower than library GEMM + addmm (2% for measuring)"},
        ),
        (
            lambda c: c.timing == GRAPH and c.M == 1,
            {"replayed from a graph, never slower than library GEMM + addmm (2% for measuring)"},
        ),
        (
            lambda c: c.timing == ENQUEUE and c.direction == FORWARD and c.dropout > 0,
            {"forward, host time of a call over F.linear's, µs"},
        ),
        (
            lambda c: c.direction == BACKWARD and c.dropout > 0 and not c.timing,
            {
                f"bf16 forward + backward, dropout 0.1, times as fast as {PEER}",
                "never slower than library GEMM + addmm (2% for measuring)",
            },
        ),
        (lambda c: c.M == 1 and not c.timing, {"never slower than library GEMM + addmm (2% for measuring)"}),
    ],
)
def test_goals_are_missed_by_their_own_cases_alone(spoilt: Callable[[Case], bool], missed: set[str]) -> None:
    judged = _judged(_rows(CASES, lambda case: 1.56 if spoilt(case) else 1.0))
    assert {title for title, reached in judged.items() if not reached.holds} == missed


def test_goals_without_their_peer_or_their_cases_are_not_judged() -> None:
    rows = _rows(CASES, lambda case: 1.0)
    judged = _judged([row for row in rows if not row.contestant.startswith("peft ")])
    title = f"bf16 forward, times as fast as {PEER}"
    assert judged[title].holds is None and judged[title].verdict == "0 of 29 cases measured"
    assert judged["bf16 forward, over frozen"].holds
    some = _judged([row for row in rows if row.M != 16384])
    assert some["bf16 forward, over frozen"].verdict == "22 of 29 cases measured"


def _report(tmp_path: Path) -> tuple[str, list[str]]:
    """The page about the GPU and the names of all pictures."""
    for page in set(report.PAGES.values()):
        path = tmp_path / page
        path.parent.mkdir(parents=True, exist_ok=True)
        markers = [marker for marker, place in report.PAGES.items() if place == page]
        path.write_text("\n".join(f"<!-- {marker} -->\nold\n<!-- /{marker} -->" for marker in markers))
    assert report.main([f"--results={tmp_path / 'results'}", f"--root={tmp_path}"]) == 0
    pictures = sorted(path.name for path in (tmp_path / report.PICTURES).iterdir())
    return (tmp_path / report.PAGES["gpu"]).read_text(), pictures


@pytest.fixture
def _cpu_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write(made_up.rows(all_cases()[:3]), tmp_path / "results" / "a-cpu.csv")
    (tmp_path / "results" / "demo-a-cpu.json").write_text(json.dumps({"runs": {}, "date": "2026-01-02"}))
    monkeypatch.setattr(report.page_tables, "demo", lambda path: "the demo")


@pytest.mark.usefixtures("_cpu_results")
def test_without_results_of_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    text, drawn = _report(tmp_path)
    assert f"<!-- gpu -->\n{gpu_page.NOTHING}\n<!-- /gpu -->" in text and not [name for name in drawn if "h200" in name]


@pytest.mark.usefixtures("_cpu_results")
def test_results_of_a_gpu_add_their_tables_and_plots(tmp_path: Path) -> None:
    rows = _rows(CASES, lambda case: 1.02 if case.trains else 1.01)
    results.write(rows, tmp_path / "results" / "nvidia-h200.csv")
    before = results.read(tmp_path / "results" / "a-cpu.csv")
    text, drawn = _report(tmp_path)
    page = text.split("<!-- gpu -->")[1].split("<!-- /gpu -->")[0]
    assert "**NVIDIA H200**" in page and "NVIDIA H200, torch 2.13.0" in page and "commit abc1234" in page
    assert "| bf16 forward, over frozen | ≤ 1.03 (geometric mean) | 1.01 | reached |" in page
    assert "*forward, called: geometric mean 1.01 (2.00)*" in page
    assert "| K×N | M = 1 | M = 16 | M = 128 | M = 512 | M = 2048 | M = 8192 | M = 16384 |" in page
    assert "| 4096×11008 | 1.01 (2.00) | 1.01 (2.00) |" in page
    assert "*forward + backward, replayed from a CUDA graph: geometric mean 1.02 (2.00)*" in page
    assert "| r = 128 | forward + backward, 8192×28672, M = 8192 | 1.02 | 1.50 | 2.00 | 2.00 |" in page
    assert "| dropout 0.1 | forward, 4096×4096, M = 2048 | 1.01 | 1.50 | 2.00 | 2.00 |" in page
    assert "| 25 % | forward, 4096×4096, M = 2048 | 1.01 | 1.50 | 2.00 | 2.00 |" in page
    assert "| `forward/4096x1024/M1/r16/bf16/no-bias/enqueue` | peftkernels | 101.0 | +1.0 |" in page
    pictures = [name for name in drawn if name.startswith("nvidia-h200-")]
    assert len(pictures) == 3 and all(f"](pictures/{name})" in page for name in pictures)
    assert "Also measured on NVIDIA H200." in (tmp_path / report.PAGES["measured"]).read_text()
    # The CPU's tables and pictures are what they are without a GPU's file beside them.
    for marker in ("goals", "layers", "training", "allocators"):
        cpu = (tmp_path / report.PAGES[marker]).read_text()
        assert "H200" not in cpu and "h200" not in cpu
    assert results.read(tmp_path / "results" / "a-cpu.csv") == before


@pytest.mark.usefixtures("_cpu_results")
def test_a_part_of_the_cases_gives_a_part_of_the_tables(tmp_path: Path) -> None:
    results.write(_rows(list(GROUPS["gpu-mixed"]), lambda case: 1.0), tmp_path / "results" / "nvidia-h200.csv")
    page = _report(tmp_path)[0].split("<!-- gpu -->")[1]
    assert "cases measured" in page and "geometric mean 1" not in page and "| r = " not in page


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    rows = _rows(CASES, lambda case: 1.02)
    drawn = plots.draw_all(rows, tmp_path)
    assert [plot.path.name for plot in drawn] == [
        "ratio-against-tokens.png",
        "ratio-against-rank.png",
        "ratio-against-active-share.png",
    ]
    assert all(plot.path.read_bytes()[:4] == b"\x89PNG" for plot in drawn)
    assert plots.draw_all([], tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_a_file_without_the_newer_columns_is_the_cpus(tmp_path: Path) -> None:
    path = tmp_path / "older.csv"
    rows = made_up.rows(all_cases()[:2])
    results.write(rows, path)
    lines = path.read_text().splitlines()
    assert lines[0].endswith(",date,timing,device")
    path.write_text("\n".join(line.rsplit(",", 2)[0] for line in lines) + "\n")
    assert results.read(path) == rows and {row.device for row in results.read(path)} == {results.CPU}
    # One of the two is no version that there ever was.
    path.write_text("\n".join(line.rsplit(",", 1)[0] for line in lines) + "\n")
    with pytest.raises(ResultsError, match="its columns are not those of this version"):
        results.read(path)


def test_a_copy_without_a_repository_says_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERNELS_COMMIT", "abc1234")
    assert results.commit() != "abc1234", "a repository knows better"
    monkeypatch.setattr(results, "_commit", lambda: None)
    assert results.commit() == "abc1234"
    monkeypatch.delenv("PEFTKERNELS_COMMIT")
    assert results.commit() == "unknown"
