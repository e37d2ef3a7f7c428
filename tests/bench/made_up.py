"""Results that were never measured: known ratios for any cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench import lineup, results
from bench.cases import Case
from bench.results import Origin, Row
from bench.runner import Measured
from peftkernels.cli.timing import Samples

ORIGIN = Origin(2, "a processor, 2 cores", "2.13.0", "0.21.2", "3.11", "0.1.0", "abc1234", "2026-01-02")


def measured(case: Case, ours: float = 0.5, peers: float = 1.25, disturbed: bool = False) -> Measured:
    """Three rounds in which the baseline takes 1, 2 and 4 ms, ours and the peers a fixed share of it."""
    names = lineup.contestants(case)
    shares = dict.fromkeys(names, peers) | {names[0]: 1.0, lineup.ours(case): ours}
    rounds = tuple({name: share * speed * 1e-3 for name, share in shares.items()} for speed in (1, 2, 4))
    samples = Samples(names[0], rounds, 1, disturbed)
    saved = dict.fromkeys(names, 1_500_000 if case.trains or case.model else None)
    return Measured(case, samples, results.rows_of(case, samples, dict.fromkeys(names, 80.0), saved, ORIGIN))


def rows(cases: Iterable[Case], ours: float = 0.5) -> list[Row]:
    """The rows of `measured` for each case."""
    return [row for case in cases for row in measured(case, ours).rows]


def comparison() -> dict[str, Any]:
    """A comparison.json of the baseline, a strategy that is worse than it, and one that is not."""

    def interval(mean: float, half: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - half, "high": mean + half, "count": 2}

    def row(accuracy: float, difference: dict[str, Any] | None) -> dict[str, Any]:
        seeds = [{"seed": seed, "accuracy": accuracy + 0.01 * seed} for seed in (0, 1)]
        step = {"step_milliseconds": 300.0, "step_ratio": 0.93, "step_ratio_p25": 0.92, "step_ratio_p75": 0.95}
        ranks = {"live_ranks": 72, "total_ranks": 216, "live_parameters": 1000, "trainable_parameters": 3000}
        return {
            "chooses": difference is not None,
            "unit": "ranks",
            "accuracy": interval(accuracy, 0.02),
            "difference": difference,
            "difference_to_uniform": None,
            "loss_level": 1.84,
            "steps_to_level": 40.0,
            "reached_level": 1,
            "mean_loss": interval(1.5, 0.1),
            "by_seed": seeds,
            **ranks,
            **step,
        }

    names = ("fixed", "lagging", "equal")
    rows = (row(0.7, None), row(0.6, interval(-0.1, 0.02)), row(0.7, interval(0.0, 0.02)))
    points = [
        {"target_rank": rank, "delta_t": delta, "live_ranks": 36 * rank, "accuracy": 0.5 + 0.1 * rank}
        for rank in (1, 2)
        for delta in (1, 5)
    ]
    sensitivity = {"seeds": 1, "delta_t": 1, "points": points, "range_over_target_rank": 0.1, "range_over_delta_t": 0.0}
    tuned = {"method": "grid", "trials": [{}] * 6, "chosen": {"learning_rate": 3e-3, "scale": 8.0}, "at_edge": []}
    return {
        "date": "2026-01-02T03:04:05",
        "versions": {"torch": "2.13.0"},
        "machine": {"processor": "a processor", "system": "kept out"},
        "arguments": {"--steps": 100, "--batch-size": 32, "--max-tokens": 32, "--threads": 1},
        "seeds": [0, 1],
        "design": {"initial_rank": 6, "target_rank": 2, "delta_t": 1, "tuning_seeds": [1000]},
        "data": {"labels": ["a", "b"], "training_texts": 80, "test_texts": 20},
        "tuning": dict.fromkeys(names, tuned),
        "contestants": dict(zip(names, rows, strict=True)),
        "sensitivity": dict.fromkeys(names, sensitivity),
        "timing": {
            "contestants": {"frozen": {"milliseconds": 320.0}},
            "rounds": 12,
            "discarded": 1,
            "disturbed": False,
            "threads": 2,
        },
        "trainings": {"count": 20, "processor_seconds": 7200.0},
    }


def peft_backend() -> dict[str, Any]:
    """What `python -m bench.peft_backend --json` writes: AdaLoRA, and LoRA disturbed and not all served."""

    def row(kind: str, dropout: float, **changes: Any) -> dict[str, Any]:
        times = {"stock_milliseconds": 400.0, "milliseconds": 300.0, "speed": 1.33, "speed_p25": 1.3, "speed_p75": 1.4}
        rounds = {"rounds": 40, "discarded": 5, "disturbed": False}
        calls = {"served": 1428, "fell_back": 0, "allocation_served": 150, "allocation_fell_back": 0}
        distances = {"gradient_error": 7e-7, "loss_distance": 2e-6}
        case = {"model": "a model", "kind": kind, "dropout": dropout, "steps": 20 if dropout else 50}
        return case | distances | times | rounds | calls | changes

    missing = dict.fromkeys(("gradient_error", "loss_distance", "allocation_served", "allocation_fell_back"))
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "versions": {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
        "machine": {"processor": "a processor", "cores": 2},
        "threads": 2,
        "rows": [row("AdaLoRA", 0.0), row("LoRA", 0.1, disturbed=True, fell_back=28, **missing)],
    }
