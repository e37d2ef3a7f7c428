"""The tables and plots of README and docs come from the results file alone."""

from __future__ import annotations

import json
from pathlib import Path

import made_up
import pytest

from bench import page_tables, report, results
from bench.cases import GROUPS, all_cases
from bench.gpu.questions.page import NOTHING

ROOT = Path(__file__).parents[2]
DEMO = {
    "date": "2026-01-02T03:04:05",
    "seconds": 1.0,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "data": {},
    "agreement": [],
    "machine": {"processor": "a processor", "threads": 2, "system": "kept out"},
    "timing": {"rounds": 3, "discarded": 0, "disturbed": False, "milliseconds": {"kept": "out"}},
    "runs": {
        "adalora": {
            "accuracy": 0.5,
            "milliseconds": 20.0,
            "ratio": 0.96,
            "ratio_p25": 0.95,
            "ratio_p75": 0.97,
            "live_ranks": 8,
            "total_ranks": 12,
            "trainable_parameters": 1234,
            "saved_bytes": 1_000_000,
            "masks": {"kept": "out"},
        }
    },
}


def _arguments(tmp_path: Path) -> list[str]:
    """What `report.main` is given; every page has its markers, between a first and a last line."""
    for page in set(report.PAGES.values()):
        markers = [marker for marker, place in report.PAGES.items() if place == page]
        path = tmp_path / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("top\n" + "\n".join(f"<!-- {m} -->\nold {m}\n<!-- /{m} -->" for m in markers) + "\nbottom\n")
    return [f"--results={tmp_path / 'results'}", f"--root={tmp_path}"]


def _page(tmp_path: Path, marker: str) -> str:
    return (tmp_path / report.PAGES[marker]).read_text()


def test_every_page_has_its_markers() -> None:
    for marker, page in report.PAGES.items():
        report.replace_between((ROOT / page).read_text(), marker, "", ROOT / page)


def test_report_writes_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(made_up.rows(all_cases(), ours=0.5), tmp_path / "results" / "machine.csv")
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    assert report.main([*_arguments(tmp_path), f"--demo={tmp_path / 'demo.json'}"]) == 0
    texts = {page: (tmp_path / page).read_text() for page in report.PAGES.values()}
    for text in texts.values():
        assert text.startswith("top\n") and text.endswith("\nbottom\n") and "old " not in text
    layers = _page(tmp_path, "layers")
    assert "| 768×3072 | 0.50 (1.25) | 0.50 (1.25) | 0.50 (1.25) | 0.50 (1.25) | 0.50 (1.25) |" in layers
    assert "**fp32, forward + backward: geometric mean 0.50 (1.25)**" in layers
    goals = _page(tmp_path, "goals")
    assert "| fp32 forward, over frozen | ≤ 0.82 (geometric mean) | 0.50 | reached |" in goals
    assert "commit abc1234" in goals and "torch 2.13.0" in goals and "2026-01-02" in goals
    training = _page(tmp_path, "training")
    assert "| MiniLM, 1024 tokens, 36 modules | peft AdaLoRA | 2.5 | 1.25 (1.25–1.25) | 0.40 | 1.5 MB |" in training
    assert "0.96 (0.95–0.97) | 8 / 12" in _page(tmp_path, "demo")
    (kept,) = (tmp_path / "results").glob("demo-*.json")
    assert "kept" not in kept.read_text().replace("kept out", "kept")
    pictures = sorted((tmp_path / report.PICTURES).iterdir())
    assert len(pictures) == 4 and all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    assert all(f"](../pictures/{p.name})" in layers for p in pictures)
    assert capsys.readouterr().out.count("written: ") == len(texts) + len(pictures)
    before = [p.read_bytes() for p in pictures]
    assert report.main(_arguments(tmp_path)) == 0
    assert [p.read_bytes() for p in pictures] == before


def test_the_readme_has_a_line_for_each_kind_of_work(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.csv"
    results.write(made_up.rows(all_cases(), ours=0.5), path)
    runs = {name: {**DEMO["runs"]["adalora"], "ratio": ratio} for name, ratio in (("lora", 0.9), ("peft-lora", 1.4))}
    (tmp_path / "results" / "demo-machine.json").write_text(json.dumps({**DEMO, "runs": runs}))
    assert report.main(_arguments(tmp_path)) == 0
    text = _page(tmp_path, "measured")
    assert "| one LoRA layer, bf16, forward + backward | 0.50 | 1.25 |" in text
    assert "| a training step of MiniLM, every linear layer with LoRA | 0.90 | 1.40 |" in text
    assert "with AdaLoRA |" not in text
    assert "measured at commit abc1234, the steps on 2026-01-02." in text
    assert "Nothing was measured on a GPU yet." in text


def test_a_comparison_of_strategies_is_kept_and_drawn(tmp_path: Path) -> None:
    results.write(made_up.rows(all_cases(), ours=0.5), tmp_path / "results" / "machine.csv")
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    (tmp_path / "comparison.json").write_text(json.dumps(made_up.comparison()))
    demo, comparison = f"--demo={tmp_path / 'demo.json'}", f"--comparison={tmp_path / 'comparison.json'}"
    assert report.main([*_arguments(tmp_path), demo]) == 0
    text = _page(tmp_path, "allocators")
    assert "The comparison of strategies was not run yet." in text
    assert "One step of rank allocation over 36 modules of 768×768, r = 12:" in text and "| adalora | 1.00 |" in text
    assert report.main([*_arguments(tmp_path), comparison]) == 0
    text = _page(tmp_path, "allocators")
    assert "not run yet" not in text
    assert "| lagging | 0.600 (0.580–0.620) | −10.0 (−12.0 to −8.0) | 300 | 0.93 (0.92–0.95) | 72 / 216 |" in text
    assert "None of the 2 adaptive strategies beats fixed rank at 72 ACTIVE ranks." in text
    assert "Worse than fixed rank at 72 ACTIVE ranks: lagging −10.0 points (−12.0 to −8.0)." in text
    assert "| equal | 0.600 | 0.700 | 0.600 | 0.700 | 10.0 | 0.0 |" in text
    assert "](../pictures/allocators.png)" in text and "2.0 hours of processor time" in text
    assert (tmp_path / report.PICTURES / "allocators.png").read_bytes()[:4] == b"\x89PNG"
    (kept,) = (tmp_path / "results").glob("allocators-*.json")
    assert "kept out" not in kept.read_text()


def test_figures_of_hf_peft_are_told(tmp_path: Path) -> None:
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    (tmp_path / "results" / "demo-x.json").write_text(json.dumps(DEMO))
    assert report.main(_arguments(tmp_path)) == 0
    assert "HF peft on peftkernels was not measured yet." in _page(tmp_path, "peft")
    (tmp_path / "results" / "peft-backend-x.json").write_text(json.dumps(made_up.peft_backend()))
    assert report.main(_arguments(tmp_path)) == 0
    text = _page(tmp_path, "peft")
    assert "HF peft on peftkernels was not measured yet." not in text
    assert "| a model | AdaLoRA | 7.0e-07 | 2.0e-06 | 400 | 300 | 1.33 (1.30–1.40) | all 1,428 | all 150 |" in text
    assert "| a model | LoRA, dropout 0.1 | – | – | 400 | 300 | 1.33 (1.30–1.40) ! | 1,428 of 1,456 | – |" in text
    assert "a processor, 2 cores, 2 threads, torch 2.13.0, peft 0.21.2, transformers 5.23.0, 2026-01-02" in text
    assert "in turns, 50 a model, 20 with dropout." in text
    assert "commit abc1234; 80 pairs of steps, 10 disturbed ones left out. In 1 rows (marked !)" in text


def test_a_file_that_has_no_figures_of_hf_peft_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    (tmp_path / "results" / "demo-x.json").write_text(json.dumps(DEMO))
    (tmp_path / "results" / "peft-backend-x.json").write_text(json.dumps(DEMO))
    assert report.main(_arguments(tmp_path)) == 2
    assert "peft-backend-x.json: cannot be read as figures of bench.peft_backend" in capsys.readouterr().err
    assert "old peft" in _page(tmp_path, "peft")
    assert "old questions" in _page(tmp_path, "questions")


def test_counts_of_attacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    (tmp_path / "results" / "demo-x.json").write_text(json.dumps(DEMO))
    assert report.main(_arguments(tmp_path)) == 0
    assert "No long run was kept yet" in _page(tmp_path, "attacks")
    counts = {"name": "kills", "title": "writes are killed", "rounds": 9, "seconds": 61.2, "faults": ["one"]}
    counts |= {"seed": 7, "date": "2026-01-02T03:04:05+00:00"}
    found = {
        "machine": {"processor": "a processor", "cores": 2, "threads": 1},
        "versions": {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
        "attacks": [{**counts, "tried": {"logs": 1200, "reports": 34}}],
    }
    path = tmp_path / "results" / "attacks-x.json"
    path.write_text(json.dumps(found))
    assert report.main(_arguments(tmp_path)) == 0
    text = _page(tmp_path, "attacks")
    assert "| `kills` | writes are killed | 1,200 logs, 34 reports | 1,234 | 1 | 61 | 7 | 2026-01-02 |" in text
    assert "a processor, 2 cores, 1 threads, torch 2.13.0, peft 0.21.2, transformers 5.23.0." in text
    path.write_text("[]")
    assert report.main(_arguments(tmp_path)) == 2
    assert "attacks-x.json: cannot be read as counts of attacks" in capsys.readouterr().err


def test_what_is_no_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "comparison.json").write_text(json.dumps(DEMO))
    assert report.main([*_arguments(tmp_path), f"--comparison={tmp_path / 'comparison.json'}"]) == 2
    assert "cannot be read as a comparison.json" in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())


def test_a_disturbed_cell_is_marked() -> None:
    case = GROUPS["grid-fp32"][0]
    rows = made_up.measured(case, disturbed=True).rows
    assert "| 0.50! (1.25) |" in page_tables.layers(page_tables.Figures(rows))
    assert "In 1 cases (marked !)" in page_tables.provenance(rows)


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(_arguments(tmp_path)) == 2
    assert "found no results (*.csv); run `make bench` first" in capsys.readouterr().err
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    assert report.main(_arguments(tmp_path)) == 2
    assert "found no demo-*.json" in capsys.readouterr().err
    assert report.main([*_arguments(tmp_path), f"--demo={tmp_path / 'none.json'}"]) == 2
    assert "--demo:" in capsys.readouterr().err
    assert "old goals" in _page(tmp_path, "goals")


def test_few_cases_make_no_plots(tmp_path: Path) -> None:
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    (tmp_path / "results" / "demo-x.json").write_text(json.dumps(DEMO))
    assert report.main(_arguments(tmp_path)) == 0
    assert list((tmp_path / report.PICTURES).iterdir()) == []
    assert "Too few cases were measured to draw any." in _page(tmp_path, "plots")
    answers = f"<!-- questions -->\n{NOTHING}\n<!-- /questions -->"
    assert _page(tmp_path, "questions") == f"top\n{answers}\nbottom\n"


def test_a_missing_marker_is_an_error_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(made_up.rows(GROUPS["bias"]), tmp_path / "results" / "machine.csv")
    (tmp_path / "results" / "demo-x.json").write_text(json.dumps(DEMO))
    arguments = _arguments(tmp_path)
    path = tmp_path / report.PAGES["goals"]
    path.write_text(path.read_text().replace("<!-- /goals -->", ""))
    before = {page: (tmp_path / page).read_text() for page in report.PAGES.values()}
    assert report.main(arguments) == 2
    assert f"{path}: found no markers <!-- goals --> and <!-- /goals -->" in capsys.readouterr().err
    assert {page: (tmp_path / page).read_text() for page in report.PAGES.values()} == before
