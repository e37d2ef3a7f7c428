"""The GPU's cases and how much time each gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import lineup
from bench.cases import ALLOCATOR, BACKWARD, DEAD, ENQUEUE, FORWARD, GRAPH, ORTHOGONALITY, Case
from bench.gpu import budget, cases
from bench.gpu.budget import Budget
from bench.gpu.cases import GROUPS, SMOKE, compiles, contestants, full, in_order, select
from bench.roofline import Peaks

PEAKS = Peaks({torch.bfloat16: 7e14}, 4e12, 4e12)
ORDERED = in_order(GROUPS)


def test_ids_are_unique_and_stable() -> None:
    ids = [case.id for _, case in in_order(full())]
    assert len(ids) == len(set(ids))
    example = Case(direction=FORWARD, K=4096, N=11008, M=1, dtype="bf16", bias=False, timing=GRAPH)
    assert example.id == "forward/4096x11008/M1/r16/bf16/no-bias/graph"


def test_the_grid_is_every_shape_and_every_number_of_rows_in_both_passes() -> None:
    grid = {(c.N, c.K, c.M, c.direction) for c in GROUPS["gpu-grid"]}
    # Weights are named N × K: outputs first, as their shapes are.
    weights = {(4096, 4096), (11008, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (1024, 4096)}
    tokens = {1, 16, 128, 512, 2048, 8192, 16384}
    assert grid == {(n, k, m, d) for n, k in weights for m in tokens for d in (FORWARD, BACKWARD)}
    assert len(GROUPS["gpu-grid"]) == 7 * 7 * 2
    assert all(c.r == 16 and c.dtype == "bf16" and not c.masking and not c.dropout for c in GROUPS["gpu-grid"])


def test_single_factors_cover_what_they_vary() -> None:
    places = {(4096, 4096), (28672, 8192)}
    for name in ("gpu-rank", "gpu-dropout", "gpu-live"):
        assert {(c.N, c.K) for c in GROUPS[name]} == places and {c.M for c in GROUPS[name]} == {2048, 8192}
        assert {c.direction for c in GROUPS[name]} == {FORWARD, BACKWARD}
    assert {c.r for c in (*GROUPS["gpu-rank"], *GROUPS["gpu-grid"])} == {8, 16, 64, 128}
    assert {c.dropout for c in GROUPS["gpu-dropout"]} == {0.1}
    assert {(c.live, c.masking) for c in GROUPS["gpu-live"]} == {(100, "PROBE"), (50, DEAD), (25, DEAD)}
    assert {c.timing for c in GROUPS["gpu-enqueue"]} == {ENQUEUE} and {c.timing for c in GROUPS["gpu-graph"]} == {GRAPH}


def test_the_whole_cross_product_is_there_for_whoever_has_the_time() -> None:
    found = {
        (c.K, c.N, c.M, c.r, c.dropout, c.live, c.direction)
        for name, group in full().items()
        for c in group
        if not c.timing and c.dtype == "bf16" and not (name == "gpu-live" and c.live == 100)
    }
    assert len(found) == 7 * 7 * 4 * 2 * 3 * 2


def test_what_goals_speak_of_comes_first_and_compiling_last() -> None:
    order = [case for _, case in ORDERED]
    assert set(order) == {case for group in GROUPS.values() for case in group}
    assert all(c.M in (2048, 8192) and not c.timing for c in order[:70])
    compiling = [compiles(case) for case in order]
    assert sum(compiling) == 4 and all(compiling[-4:])
    groups = dict(ORDERED[i][::-1] for i in range(len(ORDERED)))
    assert all(case in GROUPS[group] for case, group in groups.items())


def test_everyone_takes_part_where_they_can() -> None:
    plain = GROUPS["gpu-grid"][0]
    assert contestants(plain) == (
        lineup.FROZEN,
        lineup.FLOOR,
        lineup.PEFT_LORA_BF16,
        lineup.PEFT_LORA_FP32,
        lineup.PEFT_ADALORA_BF16,
        lineup.PEFT_ADALORA_FP32,
        lineup.OURS,
    )
    assert contestants(plain, peft=False) == (lineup.FROZEN, lineup.FLOOR, lineup.OURS)
    compiled = [case for _, case in ORDERED if lineup.COMPILED in contestants(case, compiled=True)]
    assert {(c.K, c.N, c.M) for c in compiled} == {(4096, 4096, 2048), (4096, 4096, 8192)}
    for _, case in [*ORDERED, *in_order(SMOKE)]:
        if case.operator == ALLOCATOR:
            continue
        names = contestants(case, compiled=True)
        assert names[0] == lineup.FROZEN and names[-1] == lineup.OURS and len(set(names)) == len(names) >= 4
        # A layer with a gate is no LoRA layer, and bf16 factors are not those of a mixed case.
        assert not (case.masking and {lineup.PEFT_LORA_BF16, lineup.PEFT_LORA_FP32} & set(names))
        assert not (case.dtype == "mixed" and {lineup.PEFT_LORA_BF16, lineup.PEFT_ADALORA_BF16} & set(names))


def test_allocators_are_timed_with_their_term_and_without_it() -> None:
    groups = GROUPS["gpu-allocator"], SMOKE["gpu-allocator"]
    for group in groups:
        assert {case.operator for case in group} == {ALLOCATOR} and {case.direction for case in group} == {
            "",
            ORTHOGONALITY,
        }
        for case in group:
            assert contestants(case) == (lineup.PEFT_ALLOCATOR, lineup.OURS) and not compiles(case)
    assert {(case.modules, case.K, case.N, case.r) for case in groups[0]} == {
        (56, 4096, 4096, 12),
        (224, 4096, 4096, 12),
    }


def test_cases_are_selected_by_group_and_part() -> None:
    assert select(ORDERED, []) == ORDERED
    assert [case for _, case in select(ORDERED, ["gpu-mixed"])] == list(GROUPS["gpu-mixed"])
    assert {case.M for _, case in select(ORDERED, ["/M1/", "/M16/"])} == {1, 16}
    assert select(ORDERED, ["nothing"]) == []


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("setup", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("limit", [60.0, 240.0, 1000.0])
def test_all_cases_end_within_the_limit(limit: float, setup: float) -> None:
    """Cases that take as long as they are allowed to, and `setup` seconds besides, whatever was expected of them."""
    clock = Clock()
    planned = Budget(limit, PEAKS, clock=clock)
    todo = [case for _, case in ORDERED]
    done = []
    for number, case in enumerate(todo):
        effort = planned.effort(todo[number:])
        if effort is None:
            continue
        taken = setup + (budget.COMPILE_SECONDS if compiles(case) else 0.0) + max(effort.seconds, 0.05)
        clock.now += taken
        planned.spent(case, taken, effort.seconds)
        done.append(case)
        assert budget.LEAST_SECONDS <= effort.seconds <= budget.SECONDS
        assert effort.rounds in (budget.FEWEST_ROUNDS, budget.ROUNDS)
    assert clock.now - 1000.0 <= limit + 2.0
    if limit == 1000.0:
        assert len(done) == len(todo)
    # What is left out is what matters least.
    elif setup == 1.5:
        assert 20 < len(done) < len(todo) and done[:20] == todo[:20]


def test_time_is_shared_among_the_cases_that_are_left() -> None:
    """Ten equal cases in ten seconds are a second each, half of which goes into building and verifying them."""
    cases = [replace(GROUPS["gpu-grid"][0], bias=bool(number % 2), r=number + 1) for number in range(10)]
    clock = Clock()
    planned = Budget(10.0, PEAKS, seconds=5.0, clock=clock)
    effort = planned.effort(cases)
    assert effort is not None and effort.seconds == pytest.approx(1.0 - budget.SETUP_SECONDS)
    # The first one took half a second less than it might have: the others share it.
    clock.now += 0.5
    planned.spent(cases[0], 0.5, 0.5)
    effort = planned.effort(cases[1:])
    assert effort is not None and effort.seconds == pytest.approx(9.5 / 9)


def test_without_a_limit_every_case_gets_what_was_asked_for() -> None:
    planned = Budget(None, PEAKS, seconds=7.0)
    effort = planned.effort([GROUPS["gpu-grid"][0]])
    assert effort is not None and (effort.seconds, effort.rounds) == (7.0, budget.ROUNDS)
    assert planned.left() == float("inf")


def test_a_case_whose_rounds_take_too_long_gets_the_fewest() -> None:
    huge = next(c for c in GROUPS["gpu-grid"] if (c.N, c.K, c.M, c.direction) == (28672, 8192, 16384, BACKWARD))
    small = next(c for c in GROUPS["gpu-grid"] if (c.N, c.K, c.M, c.direction) == (1024, 4096, 1, FORWARD))
    for case, rounds in ((huge, budget.FEWEST_ROUNDS), (small, budget.ROUNDS)):
        effort = Budget(100.0, PEAKS, clock=Clock()).effort([case])
        assert effort is not None and effort.rounds == rounds
    assert Budget(0.4, PEAKS, clock=Clock()).effort([small]) is None


def test_odd_shapes_are_checked_in_every_dtype() -> None:
    assert {c.dtype for c in cases.CHECKED} == {"bf16", "fp16", "fp32", "mixed"}
    assert any(c.dropout for c in cases.CHECKED) and any(c.masking for c in cases.CHECKED)
    assert {c.M for c in cases.CHECKED} == {1, 67}
