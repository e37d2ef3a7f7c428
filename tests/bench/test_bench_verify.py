"""A kernel that is wrong, even slightly, stops its case before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import layers, lineup, runner
from bench.cases import BACKWARD, DEAD, FORWARD, PROBE, Case
from bench.layers import LayerBench
from bench.verify import WrongResultError, verify
from peftkernels.cli.timing import Effort

SMALL = {"K": 96, "N": 64, "M": 24, "r": 8}
RIGHT = {
    "forward": Case(direction=FORWARD, **SMALL),
    "no bias": Case(direction=BACKWARD, bias=False, **SMALL),
    "bf16": Case(direction=BACKWARD, dtype="bf16", **SMALL),
    "mixed": Case(direction=BACKWARD, dtype="mixed", **SMALL),
    "PROBE": Case(direction=BACKWARD, masking=PROBE, live=50, **SMALL),
    "DEAD": Case(direction=BACKWARD, masking=DEAD, live=50, **SMALL),
    "nothing live": Case(direction=BACKWARD, masking=DEAD, live=0, **SMALL),
    "dropout": Case(direction=BACKWARD, dropout=0.1, **SMALL),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_results_pass(name: str) -> None:
    bench = LayerBench(RIGHT[name])
    verify(bench)
    assert set(bench.contestants) == set(lineup.contestants(RIGHT[name]))


class _Faulty(torch.autograd.Function):
    """A sound forward pass whose ∂y is spoilt on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        spoilt = grad.clone()
        spoilt[-1] = 0
        return spoilt


def _one_element(y: Tensor) -> Tensor:
    spoilt = y.clone()
    spoilt.view(-1)[17] += 0.05
    return spoilt


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "y": _one_element,
    "∂x": _Faulty.apply,
    "NaN": lambda y: y * torch.full((), float("nan"), dtype=y.dtype),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_a_wrong_kernel_is_caught(fault: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = layers.lora_linear

    def faulty(*args: Any, **keywords: Any) -> Tensor:
        y = sound(*args, **keywords)
        return FAULTS[fault](y) if keywords["impl"] == impl else y

    monkeypatch.setattr(layers, "lora_linear", faulty)
    wrong = lineup.OURS if impl == "auto" else lineup.FLOOR
    what = "y" if fault == "NaN" else fault
    with pytest.raises(
        WrongResultError, match=rf"^forward\+backward/96x64/.*: {wrong.replace('+', '.')}: {what} is wr"
    ):
        runner.build_and_verify(RIGHT["no bias"])


def test_a_scaled_adapter_is_caught_with_and_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = layers.lora_linear
    monkeypatch.setattr(layers, "lora_linear", lambda *a, **k: sound(*a, **{**k, "scaling": 1.01 * k["scaling"]}))
    for name in ("forward", "dropout", "DEAD"):
        with pytest.raises(WrongResultError):
            verify(LayerBench(RIGHT[name]))


def test_a_peer_that_computes_something_else_is_caught() -> None:
    bench = LayerBench(RIGHT["forward"])
    with torch.no_grad():
        for parameter in bench.contestants[lineup.PEFT_ADALORA].own:
            if parameter.shape == (8, 1):
                parameter.zero_()
    with pytest.raises(WrongResultError, match="peft AdaLoRA computes something else"):
        verify(bench)


@pytest.mark.parametrize("name", ["forward", "mixed", "DEAD", "dropout"])
def test_turns_leave_gradients_on_whoever_trains(name: str) -> None:
    case = RIGHT[name]
    bench = LayerBench(case)
    for contestant, found in bench.contestants.items():
        bench.turn(contestant, 3, 2)
        assert all((p.grad is not None) == case.trains for p in found.trainable), contestant
        assert bool(found.trainable) == (contestant != lineup.FROZEN and case.trains) or not case.trains


def test_saved_bytes_count_the_input_once_and_no_parameter() -> None:
    """fp32 LoRA keeps x (24 × 96) and S (24 × 8); a bf16 base with fp32 factors keeps x in bf16 only, peft casts it."""
    bench = LayerBench(Case(direction=BACKWARD, **SMALL))
    assert bench.saved_bytes(lineup.FROZEN) == 0
    assert bench.saved_bytes(lineup.OURS) == 4 * (24 * 96 + 24 * 8)
    mixed = LayerBench(RIGHT["mixed"])
    ours, theirs = mixed.saved_bytes(lineup.OURS), mixed.saved_bytes(lineup.PEFT_LORA_FP32)
    assert ours is not None and theirs is not None
    assert ours == 2 * (24 * 96 + 24 * 8) and theirs >= 4 * (24 * 96 + 24 * 8)
    assert LayerBench(RIGHT["forward"]).saved_bytes(lineup.OURS) is None


def test_allocators_take_the_same_decisions_and_a_difference_is_caught() -> None:
    from bench.allocators import AllocatorBench

    case = Case("allocator", K=24, N=16, r=4, modules=3)
    bench = AllocatorBench(case)
    bench.verify()
    bench.turn(lineup.OURS, 0, 2)
    bench.turn(lineup.PEFT_ALLOCATOR, 0, 2)
    other = AllocatorBench(case)
    for layer in other._layers.values():
        layer.lora_B.grad = torch.randn_like(layer.lora_B)
    with pytest.raises(WrongResultError, match="the allocators keep different ranks in layer"):
        other.verify()


def test_strategies_keep_their_budget_and_one_that_does_not_is_caught() -> None:
    from bench.strategies import StrategyBench

    case = Case("strategies", K=24, N=16, r=4, modules=3)
    bench = StrategyBench(case)
    assert list(bench.contestants) == list(lineup.contestants(case))
    bench.verify()
    for name in bench.contestants:
        bench.turn(name, 0, 2)
    bench._allocators["gate"].statistics.select = lambda scores, step: (scores >= 0, scores[:1])  # type: ignore[method-assign]
    with pytest.raises(WrongResultError, match=r"gate keeps 12 ranks, expected 6; nothing was timed"):
        bench.verify()


def test_the_orthogonality_terms_agree_and_a_difference_is_caught() -> None:
    from bench.allocators import AllocatorBench

    case = Case("allocator", "orthogonality", K=24, N=16, r=4, modules=3)
    bench = AllocatorBench(case)
    gradient = bench._layers["layer0"].lora_A.grad
    before = gradient.clone()
    bench.verify()
    assert torch.equal(gradient, before)
    bench.turn(lineup.OURS, 0, 2)
    assert not torch.equal(gradient, before)
    theirs = bench._peft.model["layer0"].lora_A["default"].grad.clone()
    bench.turn(lineup.PEFT_ALLOCATOR, 0, 2)
    assert not torch.equal(bench._peft.model["layer0"].lora_A["default"].grad, theirs)
    other = AllocatorBench(case)
    other._peft.peft_config["default"].orth_reg_weight *= 1.01
    with pytest.raises(WrongResultError, match="the orthogonality terms differ by"):
        other.verify()


def test_a_measured_case_has_a_row_for_each_contestant() -> None:
    from made_up import ORIGIN

    from bench.roofline import ASSUMED

    case = Case(direction=BACKWARD, dropout=0.1, K=768, N=768, M=128)
    found = runner.measure_case(case, Effort(0.0, 1, 0.1), ASSUMED, ORIGIN)
    assert [row.contestant for row in found.rows] == list(lineup.contestants(case))
    own = runner.ours_row(found.rows, case)
    assert own.ours_ratio == 1.0 and own.saved_bytes and own.roofline_percent and own.median_us > 0
