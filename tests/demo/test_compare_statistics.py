"""The comparison's statistics against values from tables and by hand, and the words that they decide."""

from __future__ import annotations

import math
from typing import Any

import pytest

from demo.compare.statistics import (
    Interval,
    interval,
    paired_difference,
    smoothing_window,
    steps_to_level,
    t_quantile,
)
from demo.compare.words import findings, points


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=5e-5)


def test_other_confidences_and_limits() -> None:
    assert t_quantile(0.99, 4) == pytest.approx(4.6041, abs=5e-5)
    assert t_quantile(0.5, 1) == pytest.approx(1.0, abs=1e-12)
    assert t_quantile(0.95, 4000) == pytest.approx(1.9605, abs=1e-4)
    with pytest.raises(ValueError, match="confidence: found 1"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="degrees: found 0"):
        t_quantile(0.95, 0)


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert found.mean == 3 and found.count == 5
    assert (found.low, found.high) == (pytest.approx(3 - half, abs=1e-5), pytest.approx(3 + half, abs=1e-5))
    assert interval([0.7]) == Interval(0.7, None, None, 1)
    assert not interval([0.7]).above_zero
    with pytest.raises(ValueError, match="values: found none"):
        interval([])


def test_pairing_cancels_what_seeds_have_in_common() -> None:
    baseline = [0.1, 0.5, 0.9]
    better = [value + gain for value, gain in zip(baseline, (0.02, 0.03, 0.025), strict=True)]
    found = paired_difference(better, baseline)
    half = 4.302653 * 0.005 / math.sqrt(3)
    assert found.mean == pytest.approx(0.025)
    assert found.low == pytest.approx(0.025 - half, abs=1e-7) and found.above_zero and not found.below_zero
    assert paired_difference(baseline, better).below_zero
    with pytest.raises(ValueError, match="baseline: found 2 values, expected 3"):
        paired_difference(better, baseline[:2])


def test_the_level_is_reached_by_the_mean_of_the_last_steps() -> None:
    assert [smoothing_window(steps) for steps in (1, 12, 60, 1000)] == [1, 2, 10, 10]
    losses = [3.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert steps_to_level(losses, 2.0) == 2
    assert steps_to_level(losses, 1.5) == 5
    assert steps_to_level(losses, 1.0) == 6
    assert steps_to_level(losses, 0.9) is None


DESIGN = {"tuning_seeds": [1000]}


def row(difference: tuple[float, float, float] | None, *, chooses: bool = True) -> dict[str, Any]:
    """As in comparison.json, as far as words need it."""
    names = ("mean", "low", "high")
    return {
        "chooses": chooses,
        "unit": "ranks",
        "live_ranks": 72,
        "by_seed": [{}, {}],
        "difference": None if difference is None else {**dict(zip(names, difference, strict=True)), "count": 2},
        "difference_to_uniform": None,
    }


def words(**rows: dict[str, Any]) -> str:
    """The findings of a comparison with these contestants beside the baseline."""
    trials = {"method": "grid", "trials": [{}] * 6, "at_edge": []}
    every = {"fixed": row(None, chooses=False), **rows}
    return "\n".join(findings({"contestants": every, "tuning": dict.fromkeys(every, trials), "design": DESIGN}))


def test_who_does_not_beat_fixed_rank_is_said() -> None:
    found = words(one=row((0.01, -0.01, 0.03)), two=row((-0.02, -0.03, -0.01)))
    assert "None of the 2 adaptive strategies beats fixed rank at 72 ACTIVE ranks." in found
    assert "Worse than fixed rank at 72 ACTIVE ranks: two −2.0 points (−3.0 to −1.0)." in found
    assert "No difference to fixed rank at 72 ACTIVE ranks can be told" in found
    assert "one +1.0 points (−1.0 to +3.0)" in found
    assert "one does not beat fixed rank" in words(one=row((0.01, -0.01, 0.03)))


def test_who_beats_fixed_rank_is_said() -> None:
    found = words(one=row((0.02, 0.01, 0.03)), plain=row((0.05, 0.04, 0.06), chooses=False))
    assert "Better than fixed rank at 72 ACTIVE ranks: one +2.0 points (+1.0 to +3.0)." in found
    assert "None of" not in found and "Worse" not in found and "No difference" not in found
    assert "plain, which chooses nothing: +5.0 points (+4.0 to +6.0) against fixed rank." in found


def test_a_choice_at_the_edge_of_the_grid_is_said() -> None:
    tuning = {"fixed": {"method": "grid", "trials": [{}] * 6, "at_edge": ["learning_rate"]}}
    found = findings({"contestants": {"fixed": row(None, chooses=False)}, "tuning": tuning, "design": DESIGN})
    assert "tuned with 6 trials" in found[-1] and "beyond it: fixed (learning rate)." in found[-1]


def test_one_seed_has_no_interval() -> None:
    assert points({"mean": 0.011, "low": None, "high": None, "count": 1}) == "+1.1 points"
    assert points(None) == ""


def test_what_a_search_chose_and_its_front_are_said() -> None:
    candidate = {"learning_rate": 0.004, "tinit": 0.1, "tfinal": 0.3, "deltaT": 5, "group_weights": {"mlp": 2.0}}
    front = [{"live_parameters": 3000, "accuracy": 0.5}, {"live_parameters": 60000, "accuracy": 0.75}]
    setting = {"scale": 4.0, "candidate": candidate}
    tuning = {
        "fixed": {"method": "grid", "trials": [{}] * 6, "at_edge": []},
        "pareto": {"method": "nsga2", "trials": [{}] * 24, "at_edge": [], "setting": setting, "front": front},
    }
    design = {**DESIGN, "search_trials": 24}
    found = findings({"contestants": {"fixed": row(None, chooses=False)}, "tuning": tuning, "design": design})
    assert found[-2].startswith("Every contestant but pareto was tuned with 6 trials on the same grid")
    assert "pareto is AdaLoRA after 24 trainings chosen by Optuna (NSGA-II)" in found[-1]
    assert "learning rate 0.004, scale 4, tinit 0.10 and tfinal 0.30 of the run, ΔT 5" in found[-1]
    assert found[-1].endswith("validation accuracy by parameters in ACTIVE ranks: 3,000: 0.500; 60,000: 0.750.")


def test_what_freezing_saved_is_said() -> None:
    modules = {"by_seed": [{"live_ranks_by_module": {"a": 1, "b": 2}}]}
    found = words(
        adalora={**row((0.0, -0.1, 0.1)), "training_processor_seconds": 40.0},
        freezing={**row((0.0, -0.1, 0.1)), **modules, "training_processor_seconds": 38.0, "frozen_modules": 0.4},
    )
    expected = "freezing took 0.4 of 2 modules out of the training on average; a training took 38.0 s of processor time"
    assert f"{expected}, adalora's 40.0 s." in found
