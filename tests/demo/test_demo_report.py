"""Agreement with peft is judged on every loss, and figures go into JSON whatever they are."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from demo import report
from demo.progress import DemoProgress
from demo.recipe import Recipe
from demo.train import Record

CURVE = [3.0, 2.5, 2.0] * 10


def record(name: str, losses: list[float], total: list[float] | None = None, mask: str = "110") -> Record:
    return Record(name, ["m"], losses, total or losses, masks={"m": [kept == "1" for kept in mask]})


def agreement(ours: Record, theirs: Record) -> report.Agreement:
    (found,) = report.agreements({"adalora": ours, "peft-adalora": theirs, "lora": ours})
    return found


def test_equal_curves_agree_and_masks_are_counted() -> None:
    found = agreement(record("adalora", CURVE), record("peft-adalora", CURVE, mask="011"))
    assert found.holds
    assert (found.loss_difference, found.steps, found.same_masks, found.all_masks) == (0, 20, 1, 3)
    assert "1 of 3 ranks end in the same state" in report.agreement_note(found)


@pytest.mark.parametrize("step", [0, 19])
@pytest.mark.parametrize("curve", ["losses", "total"])
def test_one_step_off_by_two_per_mille_is_no_agreement(step: int, curve: str) -> None:
    off = [loss * (1.002 if i == step else 1.0) for i, loss in enumerate(CURVE)]
    theirs = record("peft-adalora", off) if curve == "losses" else record("peft-adalora", CURVE, off)
    found = agreement(record("adalora", CURVE), theirs)
    assert not found.holds
    assert found.loss_difference == pytest.approx(0.002, rel=0.01)
    assert "DO NOT AGREE" in report.agreement_note(found)


def test_later_steps_do_not_count() -> None:
    off = [loss * (2.0 if i == 20 else 1.0) for i, loss in enumerate(CURVE)]
    assert agreement(record("adalora", CURVE), record("peft-adalora", off)).holds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_never_agree(value: float) -> None:
    broken = [value, *CURVE[1:]]
    assert not agreement(record("adalora", broken), record("peft-adalora", broken)).holds


def test_numbers_that_json_lacks_become_null() -> None:
    assert report.finite({"a": [1.5, math.nan], "b": (math.inf, {"c": 2})}) == {"a": [1.5, None], "b": [None, {"c": 2}]}


def test_learning_rate_rises_then_falls_and_never_leaves_its_bounds() -> None:
    recipe = Recipe(steps=100)
    factors = [recipe.learning_rate_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 6)
    assert max(factors) == factors[5] == 1.0
    assert factors[-1] == pytest.approx(1 / 94)
    assert all(0 < factor <= 1 for factor in factors)
    assert recipe.learning_rate_factor(100) == 0.0


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 1000])
def test_budget_has_room_to_fall_at_any_number_of_steps(steps: int) -> None:
    recipe = Recipe(steps)
    assert 0 <= recipe.tinit < recipe.steps - recipe.tfinal


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr("demo.progress.time.monotonic", lambda: next(now))
    text = io.StringIO()
    with DemoProgress(100, Console(file=text, width=120)) as progress:
        progress.begin("LoRA", 40)
        progress.advance(1, "loss 3.0")
        progress.advance(20, "loss 2.5")
        progress.advance(22, "loss 2.4")
        progress.end()
    assert text.getvalue() == "LoRA: 40 steps\nLoRA: 20 of 40, loss 2.5, about 10 s left\n"


def test_time_left_of_a_resumed_training_comes_from_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 0.0, 10.0])
    monkeypatch.setattr("demo.progress.time.monotonic", lambda: next(now))
    text = io.StringIO()
    with DemoProgress(100, Console(file=text, width=120)) as progress:
        progress.begin("LoRA", 40)
        progress.advance(10, "loss 3.0")
        progress.advance(20, "loss 2.5")
        progress.end()
    assert text.getvalue().endswith("LoRA: 20 of 40, loss 2.5, about 20 s left\n")


def test_the_whole_jobs_time_left_does_not_count_what_was_stored() -> None:
    """A part that was finished, one that is continued at 10 of 40, and 10 steps of it in 20 s: 20 steps and 40 more."""
    seconds = 0.0
    with DemoProgress(120, Console(file=io.StringIO(), width=100, force_terminal=True)) as progress:
        bars = progress._bars
        bars.get_time = lambda: seconds
        progress.begin("stored", 40)
        progress.end()
        seconds = 1.0
        progress.begin("continued", 40)
        progress.advance(10)
        assert [task.completed for task in bars.tasks] == [50, 10]
        assert [task.time_remaining for task in bars.tasks] == [None, None]
        for step in range(11, 21):
            seconds += 2.0
            progress.advance(step)
        whole, part = bars.tasks
        assert whole.completed == 60 and part.completed == 20
        # rich takes the time from the first step that was made here: 9 steps in 18 s.
        assert (whole.time_remaining, part.time_remaining) == (120, 40)
        # What the job took goes on counting from its start.
        assert whole.start_time is not None and whole.start_time != 1.0


def test_progress_draws_bars_with_the_time_left_on_a_terminal() -> None:
    text = io.StringIO()
    with DemoProgress(100, Console(file=text, width=100, force_terminal=True)) as progress:
        progress.begin("LoRA", 40)
        progress.advance(10, "loss 3.0")
        progress.end()
    assert "whole demo" in text.getvalue()
    assert "10/40" in text.getvalue()
    assert "loss 3.0" in text.getvalue()
