"""The registry: ids are unique and stable, groups hold what they say, everything fits into half an hour."""

from __future__ import annotations

import pytest
import torch

from bench import cases, lineup, plan, roofline
from bench.cases import (
    ALLOCATOR,
    BACKWARD,
    DEAD,
    FORWARD,
    GROUPS,
    ORTHOGONALITY,
    PROBE,
    STRATEGIES,
    Case,
    all_cases,
    select,
)
from bench.roofline import Peaks
from bench.runner import adjusted
from peftkernels.cli.timing import Effort


def test_ids_are_unique() -> None:
    ids = [case.id for case in all_cases()]
    assert len(ids) == len(set(ids)) > 300


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(direction=FORWARD, K=768, N=3072, M=512), "forward/768x3072/M512/r16/fp32"),
        (
            Case(direction=BACKWARD, K=4096, N=11008, M=1, r=4, dtype="mixed", bias=False),
            "forward+backward/4096x11008/M1/r4/mixed/no-bias",
        ),
        (
            Case(direction=FORWARD, K=8, N=9, M=7, masking=DEAD, live=25, dropout=0.1),
            "forward/8x9/M7/r16/fp32/live25-DEAD/dropout0.1",
        ),
        (cases.training_case("llama", 512, 56), "training/llama/M512/56-modules"),
        (Case(ALLOCATOR, K=768, N=768, r=12, modules=36), "allocator/36-modules/768x768/r12"),
        (Case(STRATEGIES, K=768, N=768, r=12, modules=36), "strategies/36-modules/768x768/r12"),
        (
            Case(ALLOCATOR, ORTHOGONALITY, K=768, N=768, r=12, modules=56),
            "allocator+orthogonality/56-modules/768x768/r12",
        ),
    ],
)
def test_ids_are_stable(case: Case, expected: str) -> None:
    """Result files are merged by id, and compared with those of earlier versions."""
    assert case.id == expected


def test_the_base_grid_is_whole() -> None:
    grid = {(c.K, c.N, c.M, c.direction) for c in GROUPS["grid-fp32"]}
    assert len(grid) == len(GROUPS["grid-fp32"]) == 8 * 5 * 2
    assert all(c.r == 16 and c.dtype == "fp32" and not c.masking for c in GROUPS["grid-fp32"])
    for dtype in ("bf16", "mixed"):
        assert len(GROUPS[f"grid-{dtype}"]) == 8 * (4 + 3)


def test_single_factors_cover_what_they_vary() -> None:
    assert {c.r for c in GROUPS["rank"]} >= {1, 4, 16, 64, 256}
    assert {(c.live, c.masking) for c in GROUPS["live"]} >= {
        (share, masking) for share in (50, 25, 0) for masking in (PROBE, DEAD)
    } | {(100, PROBE)}
    assert {c.modules for c in GROUPS["allocator"]} == {36, 56, 72, 224}
    assert {c.modules for c in GROUPS["allocator+orthogonality"]} == {56, 72, 224}
    assert {c.model for c in GROUPS["training"]} == {"minilm", "llama"}
    assert all(lineup.HALF_RANK in lineup.contestants(c) for c in GROUPS["half-dead"])
    assert all(lineup.NO_DROPOUT in lineup.contestants(c) for c in GROUPS["dropout"])


@pytest.mark.parametrize("extent", [lineup.USUAL, lineup.BRIEF, lineup.FULL], ids=lambda extent: extent.compiled)
def test_every_case_has_ours_its_baseline_and_a_peer(extent: lineup.Extent) -> None:
    for case in all_cases():
        names = lineup.contestants(case, extent)
        assert lineup.ours(case) in names and len(names) == len(set(names)) >= 2
        assert names[0] == (lineup.PEFT_ALLOCATOR if case.operator in (ALLOCATOR, STRATEGIES) else lineup.FROZEN)
        assert any(name.startswith("peft ") for name in names), case.id


def test_full_compiles_every_unmasked_layer_and_leaves_nobody_out() -> None:
    compiled = [case for case in all_cases() if lineup.COMPILED in lineup.contestants(case)]
    assert {(case.K, case.N) for case in compiled} == set(cases.MIDDLES)
    assert not any(lineup.compiles(case, lineup.BRIEF) for case in all_cases())
    for case in all_cases():
        assert set(lineup.contestants(case)) <= set(lineup.contestants(case, lineup.FULL))
        unmasked = case.operator == cases.LAYER and not case.masking
        assert (lineup.COMPILED in lineup.contestants(case, lineup.FULL)) == unmasked


def test_cases_are_selected_by_group_part_and_glob() -> None:
    assert select([]) == all_cases()
    assert select(["dropout"]) == list(GROUPS["dropout"])
    assert {c.M for c in select(["forward/768x768/M1/"])} == {1}
    assert {c.id for c in select(["*/M1/*/mixed"])} == {c.id for c in all_cases() if c.M == 1 and c.dtype == "mixed"}
    assert set(select(["bias", "allocator"])) == {*GROUPS["bias"], *GROUPS["allocator"]}
    with pytest.raises(
        ValueError, match=r"no case 'nothing'; expected a part of an id, a glob over ids, or a group of"
    ):
        select(["bias", "nothing"])


def test_the_plan_ends_within_thirty_minutes() -> None:
    planned = plan.plan(all_cases())
    assert sum(item.seconds for item in planned) <= plan.LIMIT_SECONDS < 30 * 60
    assert {item.case for item in planned} == set(all_cases())
    slow = Peaks({dtype: flops / 3 for dtype, flops in roofline.ASSUMED.flops.items()}, 10e9, 20e9)
    squeezed = plan.plan(all_cases(), peaks=slow)
    assert {item.effort.rounds for item in squeezed} == {plan.FEWEST_ROUNDS}
    assert max(item.effort.seconds for item in squeezed) < plan.SECONDS


def test_the_plan_keeps_to_the_time_and_rounds_asked_for() -> None:
    (item,) = plan.plan([GROUPS["bias"][0]], seconds=7.0, limit=None)
    assert item.effort.seconds == 7.0 and item.effort.rounds == plan.ROUNDS
    assert item.effort.most_seconds == 21.0 and item.seconds >= 7.0


def test_compiling_is_paid_for_once_for_each_layer_and_pass() -> None:
    chosen = [case for case in GROUPS["grid-fp32"] if lineup.compiles(case)]
    total = sum(item.seconds for item in plan.plan(chosen, limit=None))
    layers = len({(case.K, case.N, case.direction) for case in chosen})
    alone = sum(plan.plan([case], limit=None)[0].seconds for case in chosen)
    assert alone - total == pytest.approx((len(chosen) - layers) * plan.COMPILE_SECONDS)


def test_roofline_counts_products_and_bytes() -> None:
    """By hand: 2·M·N·K and 2·M·r·(K + N) forward; twice and thrice that with backward; each byte once."""
    case = Case(direction=FORWARD, K=64, N=32, M=8, r=4)
    found = roofline.work(case, lineup.OURS)
    assert found.flops == 2 * 8 * 64 * 32 + 2 * 8 * 4 * (64 + 32)
    assert found.moved == 4 * 8 * (64 + 32)
    assert found.cached == 4 * (64 * 32 + 32 + 4 * (64 + 32))
    assert roofline.work(case, lineup.FROZEN).flops == 2 * 8 * 64 * 32
    both = roofline.work(Case(direction=BACKWARD, K=64, N=32, M=8, r=4), lineup.OURS)
    assert both.flops == 2 * (2 * 8 * 64 * 32) + 3 * (2 * 8 * 4 * (64 + 32))
    dead = roofline.work(Case(direction=BACKWARD, K=64, N=32, M=8, r=4, masking=DEAD, live=0), lineup.OURS)
    assert dead.flops == roofline.work(Case(direction=BACKWARD, K=64, N=32, M=8), lineup.FROZEN).flops
    peaks = Peaks({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e12, 1e12)
    assert roofline.percent(case, lineup.FROZEN, 2 * 8 * 64 * 32 * 2e-9, peaks) == pytest.approx(50)
    assert roofline.percent(GROUPS["allocator"][0], lineup.OURS, 1.0, peaks) is None


def test_late_runs_shorten_what_is_left_and_early_ones_lengthen_it() -> None:
    effort = Effort(2.0, 5, 12.0)
    assert adjusted(effort, 0.8, 2.0) == Effort(1.6, 4, pytest.approx(9.6))
    assert adjusted(effort, -1.0, 2.0) == Effort(0.0, 3, 4.0)
    assert adjusted(effort, 1.5, 2.0) == Effort(2.0, 5, 18.0)
    squeezed = Effort(0.5, 3, 3.0)
    assert adjusted(squeezed, 1.5, 2.0) == Effort(0.75, 4, 4.5)
    assert adjusted(squeezed, 9.0, 2.0) == Effort(2.0, 5, 6.0)
