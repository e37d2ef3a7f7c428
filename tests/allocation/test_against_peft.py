"""The allocator beside HF peft's own RankAllocator and AdaLoraModel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_problems import ON_THE_CPU
from small_models import FACTORS, NAMES, Base, adapt, copy_factors, peft_adalora, trainable

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.allocation.budget.schedule import CubicSchedule
from peftkernels.backends.registry import kernels_for

CONFIGS = {
    "every-step": {"total_step": 200, "target_r": 3},
    "every-10": {"total_step": 200, "target_r": 2, "deltaT": 10, "tinit": 20, "tfinal": 45},
    "warm-up-and-final": {"total_step": 180, "target_r": 4, "tinit": 37, "tfinal": 60, "beta1": 0.7, "beta2": 0.9},
    "past-the-end": {"total_step": 120, "target_r": 1, "deltaT": 7, "tfinal": 13},
}


def _record_scores(rank_allocator: Any) -> list[torch.Tensor]:
    """The list into which HF peft's allocator puts each layer's rank scores from now on, in its own order."""
    scores: list[torch.Tensor] = []
    combine = rank_allocator._combine_ipt

    def recording(ipt_E: torch.Tensor, ipt_AB: torch.Tensor) -> torch.Tensor:
        scores.append(combine(ipt_E, ipt_AB))
        return scores[-1]

    rank_allocator._combine_ipt = recording
    return scores


def _refusal(impl: str) -> str | None:
    try:
        kernels_for(torch.device("cpu"), torch.float32, impl)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", CONFIGS)
def test_200_steps_equal_peft_to_the_bit(name: str, ties: bool, impl: str) -> None:
    """From identical parameters and gradients, masks, gates, scores and averages are identical after every step."""
    if (reason := _refusal(impl)) is not None:
        pytest.skip(reason)
    config = CONFIGS[name]
    torch.manual_seed(list(CONFIGS).index(name))
    model = adapt(Base(), r=6)
    layers = {layer: model.get_submodule(layer) for layer in NAMES}
    reference = peft_adalora(Base(), init_r=6, **config)
    copy_factors(layers, reference)
    allocator = AdaLoraAllocator(model, impl=impl, **config)
    assert allocator.statistics.kernels.name == allocator.masks.kernels.name == impl
    theirs = reference.base_model.rankallocator
    their_scores = _record_scores(theirs)
    decisions = 0
    for step in range(1, 201):
        for layer_name, layer in layers.items():
            peft_layer = reference.base_model.model.get_submodule(layer_name)
            for factor in FACTORS:
                own = getattr(layer, factor)
                gradient = torch.randn_like(own) * 1e-2
                if ties and layer_name == "second":
                    # Ranks without any gradient score zero, and tie.
                    gradient.zero_()
                    own.data[:] = 0.5
                own.grad = gradient
                with torch.no_grad():
                    own.sub_(gradient, alpha=0.3)
                    getattr(peft_layer, factor)["default"].copy_(own)
                getattr(peft_layer, factor)["default"].grad = gradient.clone()

        before = theirs.peft_config.rank_pattern
        allocator.step()
        reference.base_model.update_and_allocate(step)

        pattern = theirs.peft_config.rank_pattern
        if pattern is not None:
            assert allocator.rank_pattern() == {layer: pattern[f"{layer}.lora_E.default"] for layer in NAMES}
        if their_scores:
            assert torch.equal(allocator.state_dict()["decision.scores"], torch.cat(their_scores)), step
            their_scores.clear()
        decisions += pattern is not before
        for layer_name, layer in layers.items():
            peft_layer = reference.base_model.model.get_submodule(layer_name)
            assert torch.equal(layer.lora_E, peft_layer.lora_E["default"]), (step, layer_name)
        saved = allocator.state_dict()
        averaging = "strategy.sensitivity.first.lora_A" in saved
        assert averaging == (step < config["total_step"] - config.get("tfinal", 0))
        if averaging:
            for layer_name in NAMES:
                for factor in FACTORS:
                    key = f"{layer_name}.{factor}"
                    assert torch.equal(saved[f"strategy.sensitivity.{key}"], theirs.exp_avg_ipt[f"{key}.default"]), (
                        step,
                        key,
                    )
                    assert torch.equal(saved[f"strategy.uncertainty.{key}"], theirs.exp_avg_unc[f"{key}.default"]), (
                        step,
                        key,
                    )
    assert decisions >= 10
    kept = sum(map(sum, allocator.rank_pattern().values()))
    assert kept == config["target_r"] * 3 or (ties and kept < config["target_r"] * 3)


@pytest.mark.parametrize("seed", range(4))
def test_schedule_equals_peft(seed: int) -> None:
    """Budgets are truncated from the same float64 expression, over many lengths and sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    reference = peft_adalora(Base(4, 4), init_r=2, target_r=1, total_step=10)
    theirs = reference.base_model.rankallocator
    for _ in range(60):
        total, deltaT = draw(5, 3000), draw(1, 50)
        tfinal = draw(0, total // 3)
        tinit = draw(0, total - tfinal - 1)
        initial = draw(2, 4000)
        final = draw(1, initial)
        theirs.init_bgt, theirs.target_bgt = initial, final
        config = theirs.peft_config
        config.total_step, config.tinit, config.tfinal, config.deltaT = total, tinit, tfinal, deltaT
        ours = CubicSchedule(initial, final, tinit, total - tfinal, deltaT)
        for step in range(0, total + 3, max(1, total // 97)):
            assert ours(step) == theirs.budget_schedule(step)


def test_schedule_rounds_as_peft_where_the_cube_is_close() -> None:
    """μ³ as a power and as two products truncate to different budgets here."""
    reference = peft_adalora(Base(4, 4), init_r=2, target_r=1, total_step=162)
    theirs = reference.base_model.rankallocator
    theirs.init_bgt, theirs.target_bgt = 3277, 152
    theirs.peft_config.tinit = 137
    remaining = 1 - 10 / 25
    assert int(3125 * (remaining * remaining * remaining) + 152) != theirs.budget_schedule(147)[0]
    assert CubicSchedule(3277, 152, 137, 162, 1)(147) == theirs.budget_schedule(147) == (826, True)


def _train(
    dtype: torch.dtype, steps: int, config: dict[str, int]
) -> tuple[list[float], list[float], list[bool], dict[str, list[bool]]]:
    torch.manual_seed(11)
    base = Base().to(dtype)
    reference = peft_adalora(copy.deepcopy(base), init_r=6, lora_alpha=16, orth_reg_weight=0.4, **config)
    model = adapt(base, r=6, lora_alpha=16)
    copy_factors({name: model.get_submodule(name) for name in NAMES}, reference)
    allocator = AdaLoraAllocator(model, orth_reg_weight=0.4, **config)
    ours = torch.optim.AdamW(trainable(model), lr=5e-3)
    theirs = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=5e-3)
    assert sum(p.numel() for p in trainable(model)) == sum(p.numel() for p in theirs.param_groups[0]["params"])
    allocator.attach(ours)
    data = torch.randn(steps, 2, 16, 24, dtype=dtype)
    our_losses, their_losses, same_masks = [], [], []
    for step in range(1, steps + 1):
        x, target = data[step - 1]
        loss = model(x, target).loss + allocator.regularization()
        loss.backward()
        ours.step()
        ours.zero_grad()
        our_losses.append(loss.item())

        # A PeftModel without a task type calls the base model directly and would leave out the orthogonality term.
        loss = reference.base_model(x, target).loss
        loss.backward()
        theirs.step()
        reference.base_model.update_and_allocate(step)
        theirs.zero_grad()
        their_losses.append(loss.item())
        pattern = reference.peft_config["default"].rank_pattern
        expected = {name: pattern[f"{name}.lora_E.default"] if pattern else [True] * 6 for name in NAMES}
        same_masks.append(allocator.rank_pattern() == expected)
    return our_losses, their_losses, same_masks, allocator.rank_pattern()


@pytest.mark.parametrize("deltaT", [1, 4])
def test_training_equals_peft(deltaT: int) -> None:
    """Whole runs from one start, the orthogonality term included: in float64 every mask is the same."""
    config = {"total_step": 60, "target_r": 2, "tinit": 5, "tfinal": 15, "deltaT": deltaT}
    ours, theirs, same_masks, pattern = _train(torch.float64, 70, config)
    assert all(same_masks)
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert sum(map(sum, pattern.values())) == 6
    assert ours[-1] < ours[0]


def test_float32_training_stays_beside_peft() -> None:
    """In float32 the two differ by rounding only."""
    config = {"total_step": 60, "target_r": 2, "tinit": 5, "tfinal": 15}
    ours, theirs, same_masks, _ = _train(torch.float32, 25, config)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(same_masks)
