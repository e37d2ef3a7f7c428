"""The phases of a run: budgets, rank states, reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import adapter_layers, averages_of, draw_gradients, masks, trainable

from peftkernels import RankState
from peftkernels.allocation import AdaLoraAllocator, Allocator
from peftkernels.allocation.strategies.scores import ScoreAverages

DEAD, PROBE, ACTIVE = (int(state) for state in RankState)


def _run(allocator: AdaLoraAllocator, layers: dict, steps: int) -> None:
    for _ in range(steps):
        draw_gradients(layers)
        allocator.step()


def _perturb(layers: dict) -> None:
    """What an optimizer does to every factor, masked gates included."""
    with torch.no_grad():
        for parameter in trainable(layers):
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)


def test_it_is_an_allocator() -> None:
    offered = {name for name in vars(Allocator) if not name.startswith("_")}
    assert {"attach", "detach", "regularization", "step", "budget", "rank_pattern", "explain"} <= offered
    assert offered <= set(dir(AdaLoraAllocator))


def test_budget_over_a_run() -> None:
    layers = adapter_layers((8, 9), (10, 9), (9, 8), r=12)
    allocator = AdaLoraAllocator(layers, total_step=100, target_r=4, tinit=10, tfinal=30)
    budgets = [allocator.budget(step) for step in range(1, 121)]
    assert budgets[:10] == [36] * 10
    assert budgets[10] < 36
    assert budgets[69:] == [12] * 51
    assert all(earlier >= later for earlier, later in itertools.pairwise(budgets))
    # 24·(1 - 20/60)³ + 12 = 19.11…
    assert budgets[29] == 19


def test_masked_ranks_are_probe_after_a_mask_and_active_between() -> None:
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=60, target_r=2, tinit=5, deltaT=4, tfinal=10)
    for step in range(1, 50):
        _perturb(layers)
        _run(allocator, layers, 1)
        states = [state for layer in masks(layers).values() for state in layer]
        gates = torch.cat([layer.lora_E.detach().flatten() for layer in layers.values()])
        if step > 5 and step % 4 == 0:
            assert states.count(ACTIVE) == allocator.budget(step)
            assert states.count(PROBE) == 12 - allocator.budget(step)
            assert [state == ACTIVE for state in states] == (gates != 0).tolist()
            assert [state == ACTIVE for state in states] == list(itertools.chain(*allocator.rank_pattern().values()))
        else:
            assert states == [ACTIVE] * 12
            assert gates.all()


def test_a_masked_rank_comes_back_when_its_score_does() -> None:
    torch.manual_seed(1)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=400, target_r=2)
    revived = 0
    previous = None
    for _ in range(150):
        _perturb(layers)
        _run(allocator, layers, 1)
        pattern = list(itertools.chain(*allocator.rank_pattern().values()))
        if previous is not None:
            revived += sum(now and not before for now, before in zip(pattern, previous, strict=True))
        previous = pattern
    assert revived > 5


@pytest.mark.parametrize("compact", [False, True])
def test_final_phase(compact: bool) -> None:
    torch.manual_seed(2)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2, tfinal=5, compact=compact)
    _run(allocator, layers, 14)
    assert DEAD not in list(itertools.chain(*masks(layers).values()))
    _run(allocator, layers, 1)
    final = allocator.rank_pattern()
    masked = DEAD if compact else PROBE
    for _ in range(10):
        assert masks(layers) == {name: [ACTIVE if k else masked for k in kept] for name, kept in final.items()}
        _perturb(layers)
        for parameter in trainable(layers):
            parameter.grad = None
        allocator.step()
        for name, layer in layers.items():
            assert (layer.lora_E.flatten() != 0).tolist() == final[name]
    assert allocator.rank_pattern() == final
    assert sum(map(sum, final.values())) == 4
    assert not any(name.startswith("strategy.") for name in allocator.state_dict())


def test_compact_term_covers_live_ranks_only() -> None:
    torch.manual_seed(3)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=8, target_r=2, compact=True)
    _run(allocator, layers, 7)
    for parameter in trainable(layers):
        parameter.grad = None
    allocator.regularization().backward()
    assert all(layer.lora_A.grad.all() for layer in layers.values())
    _run(allocator, layers, 1)
    for parameter in trainable(layers):
        parameter.grad = None
    allocator.regularization().backward()
    for name, kept in allocator.rank_pattern().items():
        assert layers[name].lora_A.grad.any(1).tolist() == kept
        assert layers[name].lora_B.grad.any(0).tolist() == kept


@pytest.mark.parametrize("exact_budget", [False, True])
def test_ties_in_a_run(exact_budget: bool) -> None:
    """Layers that never get a gradient score zero throughout: all masked by default, the first ones kept when exact."""
    torch.manual_seed(4)
    layers = adapter_layers((8, 9), (10, 9), (9, 8))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=4, exact_budget=exact_budget)
    for _ in range(20):
        draw_gradients(layers)
        for name in ("layer1", "layer2"):
            for parameter in (layers[name].lora_A, layers[name].lora_B, layers[name].lora_E):
                parameter.grad.zero_()
        allocator.step()
    pattern = allocator.rank_pattern()
    assert pattern["layer0"] == [True] * 6
    if exact_budget:
        assert pattern["layer1"] == [True] * 6
        assert pattern["layer2"] == [False] * 6
    else:
        assert pattern["layer1"] == pattern["layer2"] == [False] * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_do_not_underflow_into_ties(dtype: torch.dtype) -> None:
    """Products near 1e-12 are zero in float16: every rank would tie and be masked."""
    torch.manual_seed(5)
    layers = adapter_layers((8, 9), (10, 9), dtype=dtype)
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2)
    for _ in range(19):
        draw_gradients(layers, scale=1e-4)
        allocator.step()
        assert sum(map(sum, allocator.rank_pattern().values())) == allocator.budget(allocator.explain().step)
    averages = averages_of(allocator)
    assert all(value.dtype == torch.float32 for value in averages.values())
    products = [
        value * averages[name.replace("sensitivity", "uncertainty")]
        for name, value in averages.items()
        if name.startswith("sensitivity")
    ]
    assert all((product.to(torch.float16) == 0).all() for product in products)
    assert all(product.all() for product in products)
    assert layers["layer0"].lora_E.dtype == dtype


def test_layers_of_different_rank() -> None:
    torch.manual_seed(6)
    layers = {"small": adapter_layers((8, 9), r=4)["layer0"], "large": adapter_layers((8, 9), r=11)["layer0"]}
    allocator = AdaLoraAllocator(layers, total_step=30, target_r=3)
    _run(allocator, layers, 30)
    pattern = allocator.rank_pattern()
    assert (len(pattern["small"]), len(pattern["large"])) == (4, 11)
    assert sum(map(sum, pattern.values())) == 6


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_scored_together_score_as_alone(threads: int) -> None:
    """Layers of one shape are reduced in one call; the order of rounding stays that of a layer on its own."""
    torch.manual_seed(9)
    torch.set_num_threads(threads)
    shapes = ((384, 384), (384, 384), (1536, 384), (384, 384), (384, 1536), (7, 5), (1, 3))
    layers = adapter_layers(*shapes, r=12)
    together = ScoreAverages(layers, 0.85, 0.85)
    alone = [ScoreAverages({name: layer}, 0.85, 0.85) for name, layer in layers.items()]
    for _ in range(3):
        draw_gradients(layers)
        for averages in (together, *alone):
            averages.update()
    assert torch.equal(together.rank_scores(), torch.cat([averages.rank_scores() for averages in alone]))


def test_states_of_an_earlier_run_are_reset() -> None:
    layers = adapter_layers((8, 9))
    layers["layer0"].rank_plan.update_(torch.tensor([0, 1, 2, 2, 0, 1], dtype=torch.uint8))
    AdaLoraAllocator(layers, total_step=30, target_r=3, tinit=5)
    assert masks(layers) == {"layer0": [ACTIVE] * 6}
    assert layers["layer0"].rank_plan.counts.tolist() == [6, 6]


def test_explain_tells_the_decision() -> None:
    torch.manual_seed(7)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=30, target_r=2, tinit=4, tfinal=5, deltaT=3)
    assert "has not been stepped" in str(allocator.explain())
    _run(allocator, layers, 4)
    report = allocator.explain()
    assert (report.phase, report.decided_at, report.threshold) == ("before the first mask", None, None)
    assert report.modules[0].score is None
    assert report.modules[0].margin is None
    assert "no mask before step 5" in str(report)

    _run(allocator, layers, 9)
    report = allocator.explain()
    assert (report.step, report.decided_at, report.phase) == (13, 12, "budget decreasing")
    assert report.budget == allocator.budget(13)
    assert (report.n_kept, report.n_total) == (allocator.budget(12), 12)
    assert "masked at step 12" in report.modules[0].why
    for module in report.modules:
        assert list(module.kept) == allocator.rank_pattern()[module.name]
        assert [score > report.threshold for score in module.scores] == list(module.kept)
        assert module.margin == min(abs(score - report.threshold) for score in module.scores)
        assert module.score == pytest.approx(sum(module.scores))
    text = str(report)
    assert all(name in text for name in ("layer0", "layer1", "kept", "margin", "threshold"))
    assert len({line.index("why") if "why" in line else 0 for line in text.splitlines()[1:]}) == 2

    _run(allocator, layers, 20)
    assert allocator.explain().phase == "final ranks"
    assert allocator.explain().decided_at == 25


def test_explain_where_a_layer_keeps_all_or_none() -> None:
    torch.manual_seed(8)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=3)
    for _ in range(20):
        draw_gradients(layers, scale=1e-3)
        for parameter in (layers["layer0"].lora_A, layers["layer0"].lora_B):
            parameter.grad.mul_(1000)
        allocator.step()
    first, second = allocator.explain().modules
    assert first.n_kept == 6
    assert "every score is above the threshold" in first.why
    assert second.n_kept == 0
    assert "no score is above the threshold" in second.why
