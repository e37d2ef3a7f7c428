"""Adapter cards are valid model cards, say what was decided, and never replace what somebody wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.made_up_run import MadeUpRun

from peftkernels.allocation import DecisionLog, RunLog, adapter_card, read_log
from peftkernels.allocation.logs.card import write_card

CONFIG = {
    "peft_type": "ADALORA",
    "base_model_name_or_path": "organisation/model-v2",
    "init_r": 4,
    "total_step": 1,
    "rank_pattern": {"hidden": [True]},
}


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    MadeUpRun(modules=3, steps=20).feed([DecisionLog(tmp_path / "decisions.jsonl")])
    return read_log(tmp_path / "decisions.jsonl")


def card(log: RunLog | None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "seeds": {"adapters": 7, "batches": 11},
        "data_fingerprint": "240 texts, abc",
        "pattern": {"one": [True, False, True]} if log is None else log.rank_pattern(),
        "versions": {"torch": "2.13", "peft": None},
    }
    return adapter_card(log, **{**arguments, **changes})


def front_matter(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="the check of the front matter needs PyYAML installed")
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def test_front_matter_is_that_of_a_model_card(log: RunLog) -> None:
    assert front_matter(card(log)) == {
        "base_model": "organisation/model-v2",
        "library_name": "peft",
        "tags": ["peftkernels", "adalora"],
    }


def test_a_base_model_that_is_a_path_is_not_in_the_front_matter(log: RunLog) -> None:
    text = card(log, config={**CONFIG, "base_model_name_or_path": "/some/folder/model"})
    assert "base_model" not in front_matter(text)
    assert "# AdaLoRA adapter of /some/folder/model" in text


def test_everything_needed_to_repeat_it_is_there(log: RunLog) -> None:
    text = card(log, results={"test accuracy": 0.75})
    assert (
        "3 matrices with 6 of 12 ranks, decided by the strategy adalora in 12 decisions between step 3 and 14." in text
    )
    for row in (
        "| total_step | 20 |",
        "| seed of adapters | 7 |",
        "| seed of batches | 11 |",
        "| data | 240 texts, abc |",
        "| torch | 2.13 |",
        "| test accuracy | 0.75 |",
    ):
        assert row in text
    for name, kept in log.rank_pattern().items():
        digits = "".join(str(int(keep)) for keep in kept)
        assert f"| `{name}` | {sum(kept)}/4 | `{digits}` |" in text
    assert '"init_r": 4' in text
    assert '"total_step": 1' not in text  # the schedule above is the training's
    assert "hidden" not in text
    assert "| peft |" not in text


def test_fixed_ranks_have_no_schedule() -> None:
    text = card(None, config={**CONFIG, "peft_type": "LORA"})
    assert "1 matrices" not in text
    assert "1 matrix with 2 of 3 ranks, fixed from the start." in text
    assert "## Schedule" not in text
    assert front_matter(text)["tags"] == ["peftkernels", "lora"]


def test_own_card_is_replaced_and_nobody_elses(tmp_path: Path, log: RunLog) -> None:
    path = tmp_path / "README.md"
    first, second = card(log), card(log, data_fingerprint="other")
    assert write_card(tmp_path, first)
    assert write_card(tmp_path, second)
    assert path.read_text() == second
    for theirs in ("# My adapter\n", second + "\nMy own words.\n", second.replace("AdaLoRA", "Our"), ""):
        path.write_text(theirs)
        assert not write_card(tmp_path, first)
        assert path.read_text() == theirs
    path.write_bytes(b"\xff\xfe")
    assert not write_card(tmp_path, first)
