"""`freeze`: layers that leave the fine-tuning, at any moment of it."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import pytest
import torch
from small_models import NAMES, Base, adapt, adapter_layers, draw_gradients, masks, trainable
from torch import Tensor, nn

from peftkernels import RankState
from peftkernels.allocation import AdaLoraAllocator, BudgetAllocator
from peftkernels.allocation.run.orthogonality import orthogonality
from peftkernels.allocation.strategies import STRATEGIES

DEAD, PROBE, ACTIVE = (int(state) for state in RankState)
# Before the first mask, at a mask, between two, at the last allocation, in the final phase.
MOMENTS = (2, 6, 7, 12, 13)
SETTINGS: dict[str, Any] = {"total_step": 16, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2}


class _Run:
    def __init__(self, strategy: str = "gate", weight_decay: float = 0.5, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = adapt(Base(), r=6)
        for name in NAMES:
            nn.init.normal_(getattr(self.model, name).lora_E, std=0.1)
        self.head = nn.Parameter(torch.ones(1))
        self.allocator = BudgetAllocator(self.model, STRATEGIES[strategy](), **{**SETTINGS, **options})
        parameters = [*trainable(self.model), self.head]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
        self.allocator.attach(self.optimizer)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            step = self.allocator.steps
            x, target = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(step))
            loss = self.model(x, target).loss * self.head.sum() + self.allocator.regularization()
            loss.backward()
            self.allocator.observe(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def factors(self, name: str) -> list[Tensor]:
        layer = getattr(self.model, name)
        return [layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.lora_E.detach().clone()]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_frozen_layer_stays_as_it_is(strategy: str, moment: int, drop: bool, compact: bool) -> None:
    """Factors to the bit, weight decay and momentum included; ranks ACTIVE where they are kept and DEAD elsewhere."""
    run = _Run(strategy, compact=compact)
    run.advance(moment)
    pattern = run.allocator.rank_pattern()["second"]
    run.allocator.freeze("second", drop=drop)
    run.allocator.freeze("second", drop=not drop)
    kept = [False] * 6 if drop else pattern
    assert run.allocator.rank_pattern()["second"] == kept
    layer = run.model.second
    states = [ACTIVE if keep else DEAD for keep in kept]
    assert layer.rank_state.tolist() == states
    assert (layer.lora_E.flatten() != 0).tolist() == kept
    assert layer.rank_plan.counts.tolist() == [sum(kept)] * 2
    assert not any(factor.requires_grad for factor in (layer.lora_A, layer.lora_B, layer.lora_E))
    before = run.factors("second")
    for _ in range(18 - moment):
        run.advance(1)
        assert all(torch.equal(now, then) for now, then in zip(run.factors("second"), before, strict=True))
        assert layer.rank_state.tolist() == states
        assert run.allocator.rank_pattern()["second"] == kept
    assert "frozen" in run.allocator.explain().modules[1].why
    others = run.allocator.rank_pattern()
    live = sum(others["first"]) + sum(others["third"])
    if moment < 12:
        # What the budget of six leaves to the other twelve ranks; ties may leave less.
        assert live <= max(0, 6 - sum(kept))
        if strategy != "uniform":
            assert live == max(0, 6 - sum(kept))


@pytest.mark.parametrize("between", ["backward", "step"])
def test_freezing_between_any_two_calls(between: str) -> None:
    """Also between backward() and the optimizer's step, which then finds no gradient."""
    run = _Run()
    run.advance(5)
    before = run.factors("first")
    x, target = torch.randn(2, 8, 24)
    run.model(x, target).loss.backward()
    run.allocator.freeze("first", drop=False)
    kept = torch.tensor(run.allocator.rank_pattern()["first"])
    before[2] *= kept[:, None]
    if between == "step":
        torch.nn.utils.clip_grad_norm_(trainable(run.model), 1.0)
    run.optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(run.factors("first"), before, strict=True))


def test_the_term_covers_what_is_alive() -> None:
    run = _Run("adalora", orth_reg_weight=0.4, compact=True)
    run.advance(5)
    run.allocator.freeze("first")
    run.allocator.freeze("second", drop=False)
    layers = [getattr(run.model, name) for name in NAMES]
    lora_A, lora_B = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    for steps in (0, 3, 6):
        run.advance(steps)
        pattern = {name: torch.tensor(own) for name, own in run.allocator.rank_pattern().items()}
        # Frozen ranks that are dropped are DEAD, those of trained layers only after the last allocation.
        third = pattern["third"] if run.allocator.released else torch.ones(6, dtype=torch.bool)
        living = [torch.zeros(6, dtype=torch.bool), pattern["second"], third]
        expected = orthogonality(lora_A, lora_B, 0.4, living)
        term = run.allocator.regularization()
        torch.testing.assert_close(term, expected, rtol=0, atol=0)
        term.backward()
        by_graph = [None if p.grad is None else p.grad.clone() for p in (*lora_A, *lora_B)]
        run.optimizer.zero_grad()
        assert torch.equal(run.allocator.add_regularization_gradient(), term)
        for parameter, gradient in zip((*lora_A, *lora_B), by_graph, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)
        assert [gradient is None for gradient in by_graph] == [True, True, False] * 2
        run.optimizer.zero_grad()
    assert run.allocator.released


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_layers_frozen(strategy: str) -> None:
    """What else there is goes on training, and the allocator goes on counting."""
    run = _Run(strategy)
    run.advance(5)
    for name in NAMES:
        run.allocator.freeze(name, drop=name == "first")
    pattern, head = run.allocator.rank_pattern(), run.head.detach().clone()
    run.advance(13)
    assert run.allocator.steps == 18
    assert run.allocator.rank_pattern() == pattern
    assert run.allocator.nonfinite_steps == 0
    assert not torch.equal(run.head, head)
    assert run.allocator.released


def test_unknown_layers_are_refused() -> None:
    run = _Run()
    before = masks({name: getattr(run.model, name) for name in NAMES})
    with pytest.raises(ValueError, match=r"name: found 'fourth', expected one of first, second, third$"):
        run.allocator.freeze("fourth")
    assert masks({name: getattr(run.model, name) for name in NAMES}) == before
    assert run.allocator.frozen == ()
    many = adapter_layers(*[(8, 9)] * 9)
    with pytest.raises(ValueError, match=r"layer5 and 3 more$"):
        AdaLoraAllocator(many, total_step=9, target_r=2).freeze("")


def test_a_frozen_prefix_ends_the_backward_pass() -> None:
    """Nothing before the first layer that trains is in the graph: no gradient of its output is asked for."""
    run = _Run()
    run.advance(5)
    asked: list[str] = []
    hooks = [
        getattr(run.model, name).register_forward_hook(
            lambda module, inputs, output, name=name: asked.append(name) if output.requires_grad else None
        )
        for name in NAMES
    ]

    def in_the_graph() -> list[str]:
        asked.clear()
        x, target = torch.randn(2, 8, 24)
        run.model(x, target).loss.backward()
        run.optimizer.zero_grad()
        return asked

    assert in_the_graph() == ["first", "second", "third"]
    run.allocator.freeze("first", drop=False)
    assert in_the_graph() == ["second", "third"]
    run.allocator.freeze("second")
    assert in_the_graph() == ["third"]
    for hook in hooks:
        hook.remove()


def test_a_layer_frozen_in_the_middle_passes_gradients_on() -> None:
    run = _Run()
    run.allocator.freeze("second")
    x, target = torch.randn(2, 8, 24)
    run.model(x, target).loss.backward()
    assert run.model.first.lora_E.grad is not None and run.model.first.lora_E.grad.any()
    assert run.model.second.lora_E.grad is None


def test_freezing_by_a_callback() -> None:
    """As a policy does, in the middle of the allocator's own step; the step before and after are whole ones."""
    run = _Run()
    seen = []

    def policy(allocator: BudgetAllocator) -> None:
        seen.append(allocator.statistics.gates.clone())
        if allocator.steps == 7:
            allocator.freeze("third")
            # What was computed from the factors before is not kept.
            assert not allocator.statistics.gates[12:].any()

    run.allocator.add_callback(policy)
    run.advance(10)
    assert run.allocator.frozen == ("third",)
    assert len(seen) == 10
    assert not seen[-1][12:].any()


def test_weight_decay_reaches_no_dead_gate() -> None:
    """Dead ranks of layers that train: the gate is zero after every step. Their rows have gradient zero and are only
    decayed, as any parameter of the optimizer is; they contribute nothing."""
    run = _Run(compact=True, weight_decay=0.5, tfinal=6)
    run.advance(12)
    dead = {name: torch.tensor([not keep for keep in own]) for name, own in run.allocator.rank_pattern().items()}
    x = torch.randn(4, 24)
    for _ in range(3):
        run.advance(1)
        for name in NAMES:
            layer = getattr(run.model, name)
            assert not layer.lora_E[dead[name]].any()
            spared = copy.deepcopy(layer)
            with torch.no_grad():
                spared.lora_A[dead[name]] = torch.nan
            inputs = x if name == "first" else torch.randn(4, layer.in_features)
            assert torch.equal(spared(inputs), layer(inputs))


class _Loss(nn.Module):
    """The model with a tensor for its output, which is how DDP finds what was used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.model(x, target).loss


@pytest.mark.parametrize("find_unused", [False, True])
def test_under_distributed_data_parallel(find_unused: bool) -> None:
    """A layer frozen after wrapping: an error of DDP at the next step where it waits for the layer's gradients, and
    nothing amiss with find_unused_parameters=True."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        run = _Run()
        wrapped = nn.parallel.DistributedDataParallel(_Loss(run.model), find_unused_parameters=find_unused)

        def step() -> None:
            x, target = torch.randn(2, 8, 24)
            wrapped(x, target).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

        step()
        run.allocator.freeze("first")
        before = run.factors("first")
        if find_unused:
            for _ in range(3):
                step()
            assert all(torch.equal(now, then) for now, then in zip(run.factors("first"), before, strict=True))
        else:
            # The step itself goes through; the next forward pass misses the reduction of this one.
            step()
            with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
                step()
    finally:
        torch.distributed.destroy_process_group()
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        os.rmdir(folder)


@pytest.mark.filterwarnings("error")
def test_frozen_layers_need_no_gradient() -> None:
    """The allocator asks frozen layers for nothing: no warning about gradients that they do not have."""
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=9, target_r=2)
    allocator.freeze("layer0")
    draw_gradients(layers)
    assert layers["layer0"].lora_A.grad is None
    with torch.no_grad():
        allocator.step()
    for parameter in trainable(layers):
        parameter.grad = None
    with pytest.raises(RuntimeError, match="found no gradient on any"):
        allocator.step()
