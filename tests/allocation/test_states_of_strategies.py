"""Every strategy's state goes through a file, in every phase, and continues to the bit; foreign ones are refused."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_runs import BUDGETS, COSTS, MODES, SCHEDULE, STEPS, STOPS, Run, assert_same_bits, data, make_allocator
from small_models import Base, adapt, adapter_layers, draw_gradients, masks, trainable
from torch import nn

from peftkernels.allocation import Budget, BudgetAllocator, Group
from peftkernels.allocation.strategies import STRATEGIES, GateGradient, Magnitude, Random


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_equals_uninterrupted(strategy: str, budget: str, mode: str, tmp_path: Path) -> None:
    options = MODES[mode]
    if options.get("capturable") and not STRATEGIES[strategy]().capturable:
        with pytest.raises(ValueError, match=f"capturable: found True, but the strategy {strategy!r}"):
            Run(1, strategy, budget, **options)
        return
    batches = data(STEPS)
    whole = Run(1, strategy, budget, **options)
    for step in range(STEPS):
        if step in STOPS:
            (tmp_path / str(step)).mkdir()
            whole.save(tmp_path / str(step))
        whole.advance(batches[step : step + 1])
    expected = whole.outcome()
    assert not all(map(all, expected["pattern"].values()))
    for stop in STOPS:
        resumed = Run(2, strategy, budget, **options)
        if stop % 2:
            # Where it goes on it need not be fresh.
            resumed.advance(batches[: stop + 3])
        resumed.load(tmp_path / str(stop))
        resumed.log.clear()
        resumed.advance(batches[stop:])
        # A loss and the masks for every step.
        assert resumed.log == whole.log[2 * stop :], stop
        assert_same_bits(resumed.outcome(), expected, f"from {stop}")


@pytest.mark.parametrize("mode", ["threshold", "compact", "capturable"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain AdamW", "fused AdamW"])
@pytest.mark.parametrize("strategy", ["adalora", "gate", "magnitude"])
def test_interrupted_between_any_two_calls(strategy: str, fused: bool, mode: str, tmp_path: Path) -> None:
    """With a GradScaler, two overflows and three accumulated batches for a step."""
    steps, overflows = 11, (4, 8)
    batches = data(steps, parts=3)

    def run(seed: int) -> Run:
        return Run(seed, strategy, "groups", fused=fused, **{**MODES[mode], "total_step": 9, "tfinal": 2, "tinit": 1})

    calls = [(step, name) for step in range(steps) for name in Run.calls(batches[step], True)]
    whole = run(3)
    logged = {}
    for place, (step, name) in enumerate(calls):
        # Between step() and update() a scaler holds what its own state_dict does not have.
        if step in (3, 4, 6) and name != "update":
            (tmp_path / str(place)).mkdir()
            whole.save(tmp_path / str(place))
            logged[place] = len(whole.log)
        whole.call(name, batches[step], True, step in overflows)
    assert whole.allocator.steps == steps - len(overflows)
    assert whole.allocator.skipped_steps == (2 if fused else 0)
    expected = whole.outcome()
    for stop in logged:
        resumed = run(4)
        resumed.load(tmp_path / str(stop))
        for step, name in calls[stop:]:
            resumed.call(name, batches[step], True, step in overflows)
        assert resumed.log == whole.log[logged[stop] :]
        assert_same_bits(resumed.outcome(), expected, f"from call {stop}, {calls[stop]}")


def test_pending_losses_are_in_the_state() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    arguments: dict[str, Any] = {"total_step": 10, "target_r": 2}
    first, second = (BudgetAllocator(own, GateGradient(), **arguments) for own in (copy.deepcopy(layers), layers))
    first.observe(1.0)
    first.observe(torch.tensor(4.0, dtype=torch.float16))
    second.load_state_dict(first.state_dict())
    second.observe(torch.tensor([7.0]))
    draw_gradients(layers)
    second.step()
    assert second.statistics.loss is not None
    assert second.statistics.loss.item() == 4.0
    draw_gradients(layers)
    second.step()
    assert second.statistics.loss is None


def test_frozen_layers_survive_a_resume(tmp_path: Path) -> None:
    batches = data(STEPS)
    for drop in (True, False):
        for stop in (6, 9, 15):
            whole = Run(5, "adalora", compact=stop == 15)
            whole.advance(batches[:6])
            whole.allocator.freeze("first", drop=drop)
            whole.advance(batches[6:stop])
            whole.save(tmp_path)
            resumed = Run(6, "adalora", compact=stop == 15)
            resumed.load(tmp_path)
            assert resumed.allocator.frozen == ("first",)
            assert not any(parameter.requires_grad for parameter in resumed.model.first.parameters())
            whole.advance(batches[stop:])
            resumed.advance(batches[stop:])
            assert_same_bits(resumed.outcome(), whole.outcome(), f"drop={drop} from {stop}")


def test_an_optimizer_without_the_frozen_layers_can_be_attached() -> None:
    run = Run(7, "magnitude")
    run.allocator.freeze("second")
    run.allocator.detach()
    run.allocator.attach(torch.optim.SGD(trainable(run.model), lr=0.1))
    run.allocator.detach()
    with pytest.raises(ValueError, match=r"without first\.lora_A, first\.lora_B, first\.lora_E, expected"):
        run.allocator.attach(torch.optim.SGD(trainable(run.model.third), lr=0.1))


def test_names_and_groups_of_any_kind(tmp_path: Path) -> None:
    """Names beyond ASCII, a mapping of groups of any kind, numpy's numbers and lists of patterns."""
    numpy = pytest.importorskip("numpy", reason="a budget from numpy needs numpy")
    layers = nn.ModuleDict({"注意.q"[:2]: adapter_layers((8, 9))["layer0"], "λ": adapter_layers((10, 9))["layer0"]})
    groups = types.MappingProxyType({"höher": Group(["注?"], numpy.float64(2)), "λ": Group("λ", 3)})
    allocators = [
        BudgetAllocator(own, GateGradient(), budget=Budget(groups=groups), total_step=10, exact_budget=True)
        for own in (layers, copy.deepcopy(layers))
    ]
    torch.manual_seed(0)
    for _ in range(5):
        draw_gradients(dict(layers))
        allocators[0].step()
    save_file(allocators[0].state_dict(), tmp_path / "state.safetensors")
    allocators[1].load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert_same_bits(allocators[1].state_dict(), allocators[0].state_dict())
    assert (
        "höher" in json.loads(bytes(allocators[0].state_dict()["metadata"].tolist()))["settings"]["budget"]["groups"][0]
    )


def _allocator(**changes: Any) -> BudgetAllocator:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"strategy": "gate", "budget": "microseconds", **changes}
    model = adapt(Base(), r=6)
    return make_allocator(model, arguments.pop("strategy"), arguments.pop("budget"), **arguments)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: _allocator(strategy="random"), "the strategy 'random', expected 'gate'"),
        (lambda: _allocator(deltaT=3), r"deltaT \(found 3, expected 2\)"),
        (lambda: _allocator(exact_budget=True), r"exact_budget \(found True, expected False\)"),
        (lambda: _allocator(compact=True), r"compact \(found True, expected False\)"),
        (lambda: _allocator(capturable=True), r"capturable \(found True, expected False\)"),
        (lambda: _allocator(budget=None), r"target_r \(found 2, expected None\), budget \(found None, expected \{"),
        (lambda: _allocator(budget="ranks"), r"budget \(found .*'ranks'.*, expected .*'microseconds'"),
        (
            lambda: BudgetAllocator(
                adapt(Base()), GateGradient("gradient", 0.5), budget=BUDGETS["microseconds"], costs=COSTS, **SCHEDULE
            ),
            r"rule \(found 'gradient', expected 'product'\), beta \(found 0.5, expected 0.85\)",
        ),
        (
            lambda: BudgetAllocator(
                adapt(Base()),
                GateGradient(),
                budget=BUDGETS["microseconds"],
                costs={**COSTS, "third": 0.71},
                **SCHEDULE,
            ),
            r"costs \(found \{.*'third': 0.71\}, expected \{.*'third': 0.7\}\)",
        ),
    ],
)
def test_states_of_other_allocators_are_refused(other: Any, message: str) -> None:
    own = _allocator()
    before = own.state_dict()
    with pytest.raises(ValueError, match=message):
        own.load_state_dict(other().state_dict())
    assert_same_bits(own.state_dict(), before)


def test_groups_in_another_order_are_another_budget() -> None:
    def make(*names: str) -> BudgetAllocator:
        patterns = {"all": Group("layer*", 4), "one": Group("layer0", 2)}
        budget = Budget(groups={name: patterns[name] for name in names})
        return BudgetAllocator(adapter_layers((8, 9), (8, 9)), Magnitude(), budget=budget, total_step=9)

    with pytest.raises(ValueError, match="groups one that an earlier group does not have"):
        make("all", "one")
    one = make("one", "all")
    assert [share.members for share in one.statistics.shares.shares] == [(0,), (1,)]
    layers = adapter_layers((8, 9), (8, 9), (8, 9))
    groups = {"a": Group(["layer0", "layer1"], 3), "b": Group(["layer1", "layer2"], 3)}
    first = BudgetAllocator(layers, Magnitude(), budget=Budget(groups=groups), total_step=9)
    state = first.state_dict()
    first.close()
    turned = Budget(groups=dict(reversed(groups.items())))
    second = BudgetAllocator(layers, Magnitude(), budget=turned, total_step=9)
    with pytest.raises(ValueError, match=r"budget \(found .*'a'.*'b'.*expected .*'b'.*'a'"):
        second.load_state_dict(state)


def test_layers_in_another_order_are_refused() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    first = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=2)
    turned = dict(reversed(copy.deepcopy(layers).items()))
    second = BudgetAllocator(turned, Magnitude(), total_step=9, target_r=2)
    with pytest.raises(ValueError, match="in another order: found 'layer0' as layer 0, expected 'layer1'"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("metadata"), r"state\['metadata'\]: found NoneType"),
        (lambda state: state.update(metadata=torch.ones(3)), r"state\['metadata'\]: found Tensor"),
        (lambda state: state.update(metadata=torch.ones(3, dtype=torch.uint8)), "found no JSON"),
        (lambda state: state.pop("keep"), r"state\['keep'\]: found nothing, expected \(12,\) torch.bool"),
        (lambda state: state.update(keep=state["keep"][1:].clone()), r"state\['keep'\]: found \(11,\) torch.bool"),
        (lambda state: state.pop("decision.scores"), r"state\['decision.scores'\]: found nothing, expected \(12,\)"),
        (lambda state: state.pop("decision.thresholds"), r"state\['decision.thresholds'\]: found nothing"),
        (lambda state: state.pop("losses"), r"state\['losses'\]: found nothing, expected a tensor"),
        (lambda state: state.pop("strategy.average"), r"state\['strategy.average'\]: found nothing, expected \(12,\)"),
        (
            lambda state: state.update({"strategy.average": state["strategy.average"].double()}),
            r"state\['strategy.average'\]: found \(12,\) torch.float64, expected \(12,\) torch.float32",
        ),
        (
            lambda state: state.update({"strategy.more": torch.ones(1)}),
            r"state\['strategy.more'\]: found a tensor that the strategy does not know",
        ),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_damaged_states_are_refused_before_a_change(change: Any, message: str, released: bool) -> None:
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    twins = copy.deepcopy(layers)
    source, target = (BudgetAllocator(own, GateGradient(), total_step=10, target_r=2) for own in (twins, layers))
    for allocator, own, steps in ((source, twins, 4), (target, layers, 12 if released else 2)):
        for _ in range(steps):
            draw_gradients(own)
            allocator.step()
    state = source.state_dict()
    change(state)
    before, plans, gates = target.state_dict(), masks(layers), [layer.lora_E.clone() for layer in layers.values()]
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    assert_same_bits(target.state_dict(), before)
    assert masks(layers) == plans
    assert all(torch.equal(layer.lora_E, gate) for layer, gate in zip(layers.values(), gates, strict=True))


def test_a_decision_does_not_follow_the_average() -> None:
    """Strategies give the tensor that they go on averaging in; what was decided by it stays as it was."""
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    allocator = BudgetAllocator(layers, GateGradient(), total_step=20, target_r=2, deltaT=4)
    for _ in range(4):
        draw_gradients(layers)
        allocator.step()
    told = str(allocator.explain().modules)
    draw_gradients(layers)
    allocator.step()
    decision = allocator.decision
    assert decision is not None and decision.step == 4
    assert (
        str(allocator.explain().modules).replace("; masked at step 4, every rank trains until the next mask", "")
        == told
    )
    kept = torch.tensor([keep for own in allocator.rank_pattern().values() for keep in own])
    assert torch.equal(decision.scores > decision.thresholds, kept)


def test_random_survives_another_seed_of_the_process() -> None:
    """The permutation is in the state, not drawn again."""
    layers = adapter_layers((8, 9), (10, 9))
    saved = BudgetAllocator(layers, Random(3), total_step=10, target_r=2).state_dict()
    torch.manual_seed(99)
    other = BudgetAllocator(layers, Random(3), total_step=10, target_r=2)
    assert torch.equal(other.state_dict()["strategy.scores"], saved["strategy.scores"])
    other.close()
    with pytest.raises(ValueError, match=r"seed \(found 3, expected 4\)"):
        BudgetAllocator(layers, Random(4), total_step=10, target_r=2).load_state_dict(saved)
