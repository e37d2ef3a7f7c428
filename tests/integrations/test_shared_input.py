"""Projections of one input share x·Aᵀ where that pays: who does, with what results, and when a part may not be used."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from support.peft_models import adapted, gradients, pair, relative_errors, tokens
from torch import Tensor, nn

import peftkernels
from peftkernels.backends import registry
from peftkernels.integrations.peft import layers
from peftkernels.integrations.peft.served import ATTRIBUTE
from peftkernels.integrations.peft.steps import steps_made
from peftkernels.ops.call import Shrink

each_kind = pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
# Of the seven projections of a layer: q, k and v, gate and up.
SHARED = 5


@pytest.fixture(params=["eager", "cpu"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Implementations on which a model shares; the C++ kernels would not for the sake of speed."""
    if request.param == "cpu":
        reason = registry.backend_status()["cpu"]
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setattr(layers, "sharing_disadvantage", lambda impl, request: None)
    found: str = request.param
    return found


def logits(model: Any, seed: int = 0) -> Tensor:
    found: Tensor = model(input_ids=tokens(seed)).logits
    return found


def shared(model: Any) -> int:
    """Calls with a common x·Aᵀ since the last time."""
    return peftkernels.stats(model, reset=True).shared


def attention(model: Any) -> Any:
    """The module whose children are q, k and v of the first layer."""
    return next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))


@each_kind
def test_q_k_v_and_gate_up_share(kind: str, impl: str) -> None:
    """From the second forward pass on, and results stay peft's."""
    stock, patched = pair(kind)
    peftkernels.apply_to_peft(patched, impl=impl, strict=True)
    counts = []
    for seed in range(3):
        torch.testing.assert_close(logits(patched, seed), logits(stock, seed), rtol=1e-5, atol=1e-5)
        counts.append(shared(patched))
    assert counts == [0, 2 * SHARED, 2 * SHARED]
    errors = relative_errors(gradients(patched, tokens()), gradients(stock, tokens()))
    assert max(errors.values()) <= 1e-5, errors
    assert "  10 of them with an x A^T made for several at once" in str(peftkernels.stats(patched))


@each_kind
def test_training_goes_the_same_way(kind: str, impl: str) -> None:
    """With an optimizer that does not tell that it wrote the factors."""
    stock, patched = pair(kind)
    peftkernels.apply_to_peft(patched, impl=impl, strict=True)
    losses: list[list[float]] = []
    for model in (stock, patched):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        losses.append([])
        for seed in range(6):
            ids = tokens(seed)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert shared(patched) == 5 * 2 * SHARED
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_one_operator_makes_what_several_did(impl: str) -> None:
    model = adapted("lora")
    peftkernels.apply_to_peft(model, impl=impl)
    logits(model)
    with torch.profiler.profile() as profile:
        logits(model)
    names = [event.name for event in profile.events()]
    assert names.count("peftkernels::lora_shrink") == 2 * 2
    assert names.count("peftkernels::lora_linear_fwd") == 2 * 7


def test_an_encoder(impl: str) -> None:
    stock, patched = pair("lora", "bert")
    peftkernels.apply_to_peft(patched, impl=impl, strict=True)
    for _ in range(2):
        found = patched(input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(found, stock(input_ids=tokens()).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert shared(patched) == 2 * 3


def test_the_cpp_kernels_make_their_own() -> None:
    """They have x in cache anyway."""
    model = adapted("lora")
    peftkernels.apply_to_peft(model)
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    if registry.choose("auto", Shrink(x, (weight,))) != "cpu":
        pytest.skip("the C++ kernels do not serve here")
    for _ in range(3):
        logits(model)
    assert shared(model) == 0
    assert "while rows of x are in cache" in str(registry.sharing_disadvantage("auto", Shrink(x, (weight,))))


def test_small_inputs_are_not_worth_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "choose", lambda impl, request: "triton")
    small = torch.empty(8, 128, device="meta")
    assert "x has 1024 elements" in str(registry.sharing_disadvantage("auto", Shrink(small, ())))
    large = torch.empty(8192, 4096, device="meta")
    assert registry.sharing_disadvantage("auto", Shrink(large, ())) is None


def test_dropout_is_each_projections_own(impl: str) -> None:
    model = adapted("lora", lora_dropout=0.3)
    peftkernels.apply_to_peft(model, impl=impl, strict=True)
    model.train()
    for _ in range(3):
        logits(model)
    counted = peftkernels.stats(model, reset=True)
    assert (counted.served, counted.shared) == (3 * 14, 0)
    model.eval()
    for _ in range(2):
        logits(model)
    assert shared(model) == 2 * SHARED


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool, impl: str) -> None:
    found = []
    for stage in ("stock", "patched"):
        model = adapted("lora")
        if stage == "patched":
            peftkernels.apply_to_peft(model, impl=impl, strict=True)
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found.append([gradients(model, tokens(seed)) for seed in range(2)])
    for expected, patched in zip(*found, strict=True):
        assert max(relative_errors(patched, expected).values()) <= 1e-5
    assert shared(model) > 2 * SHARED


def learned(impl: str, **changes: Any) -> tuple[Any, Any, Tensor]:
    """A patched model, its first attention after q, k and v were seen with one input, and another input."""
    model = adapted("lora", **changes)
    peftkernels.apply_to_peft(model, impl=impl, strict=True)
    here = attention(model)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        for projection in (here.q_proj, here.k_proj, here.v_proj):
            projection(x)
    peftkernels.stats(model, reset=True)
    return model, here, torch.randn(2, 6, 32)


def fresh(projection: Any, x: Tensor) -> Tensor:
    """What a projection that shares with nobody gives."""
    alone = copy.deepcopy(projection)
    found: Tensor = alone(x)
    return found


@torch.no_grad()
def test_a_part_is_used_once(impl: str) -> None:
    model, here, x = learned(impl)
    here.q_proj(x)
    assert shared(model) == 1
    here.k_proj(x)
    here.k_proj(x)
    assert shared(model) == 1


def write_to_the_factor(here: Any, x: Tensor) -> None:
    here.k_proj.lora_A["default"].weight.mul_(3)


def replace_the_factors_data(here: Any, x: Tensor) -> None:
    weight = here.k_proj.lora_A["default"].weight
    weight.data = weight.data * 3


def write_to_the_input(here: Any, x: Tensor) -> None:
    x.mul_(3)


def step_a_fused_optimizer(here: Any, x: Tensor) -> None:
    weight = here.k_proj.lora_A["default"].weight
    weight.grad = torch.ones_like(weight)
    before = weight._version
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()
    assert weight._version == before, "then the version alone would do"


@pytest.mark.parametrize(
    "change", [write_to_the_factor, replace_the_factors_data, write_to_the_input, step_a_fused_optimizer]
)
@torch.no_grad()
def test_a_part_that_no_longer_holds_is_not_used(change: Any, impl: str) -> None:
    _, here, x = learned(impl)
    here.q_proj(x)
    stale = here.k_proj(x)
    here.q_proj(x.clone())
    here.q_proj(x)
    change(here, x)
    found = here.k_proj(x)
    torch.testing.assert_close(found, fresh(here.k_proj, x))
    assert not torch.allclose(found, stale)


@torch.no_grad()
def test_a_part_of_one_round_is_not_used_in_the_next(impl: str) -> None:
    """A branch leaves the second projection out; factors are written through `.data`, which nobody sees."""
    _, here, x = learned(impl)
    here.q_proj(x)
    here.k_proj.lora_A["default"].weight.data.mul_(3)
    here.q_proj(x)
    torch.testing.assert_close(here.k_proj(x), fresh(here.k_proj, x))


@torch.no_grad()
def test_a_sibling_whose_factor_the_operator_refuses(impl: str) -> None:
    """It falls back by itself, and the others share as before."""
    model, here, x = learned(impl)
    peftkernels.apply_to_peft(model, impl=impl)
    for projection in (here.q_proj, here.k_proj, here.v_proj):
        projection(x.clone())
    for projection in (here.q_proj, here.k_proj, here.v_proj):
        projection(x)
    here.k_proj.scaling["default"] = torch.tensor([2.0])
    again = x.clone()
    for projection in (here.q_proj, here.k_proj, here.v_proj):
        torch.testing.assert_close(projection(again), fresh(projection, again))


@torch.no_grad()
def test_another_adapter_takes_no_part_of_the_first(impl: str) -> None:
    model, here, x = learned(impl)
    torch.manual_seed(3)
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = False
    model.add_adapter("second", config)
    here.q_proj(x)
    model.set_adapter("second")
    torch.testing.assert_close(here.k_proj(x), fresh(here.k_proj, x))


@torch.no_grad()
def test_autocast_between_two_calls(impl: str) -> None:
    _, here, x = learned(impl)
    with torch.autocast("cpu", torch.bfloat16):
        here.q_proj(x)
    assert here.k_proj(x).dtype == torch.float32
    here.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert here.k_proj(x).dtype == torch.bfloat16


@torch.no_grad()
def test_those_who_do_not_come_follow_no_more(impl: str) -> None:
    model, here, x = learned(impl)
    for other in (x, x.clone(), x.clone()):
        here.q_proj(other)
        here.k_proj(other)
    leader = vars(here.q_proj)[ATTRIBUTE].input
    assert [follower() for follower in leader._followers[here.q_proj]] == [here.k_proj]
    assert shared(model) == 6


@torch.no_grad()
def test_a_disabled_sibling_is_left_out(impl: str) -> None:
    model, here, x = learned(impl)
    here.k_proj.enable_adapters(False)
    here.q_proj(x)
    base = here.k_proj(x)
    assert torch.equal(base, here.k_proj.base_layer(x))
    here.v_proj(x)
    assert shared(model) == 2


@torch.no_grad()
def test_a_sibling_that_was_reverted_by_itself_is_left_out(impl: str) -> None:
    model, here, x = learned(impl)
    peftkernels.revert(here.k_proj)
    expected = fresh(here.k_proj, x)
    here.q_proj(x)
    torch.testing.assert_close(here.k_proj(x), expected)
    here.v_proj(x)
    assert shared(model) == 2


def test_copies_and_pickles_share_among_themselves(impl: str) -> None:
    model = adapted("lora")
    peftkernels.apply_to_peft(model, impl=impl)
    logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inputs = {
            id(vars(module)[ATTRIBUTE].input) for module in attention(other).children() if hasattr(module, "lora_A")
        }
        assert len(inputs) == 1
        assert vars(attention(model).q_proj)[ATTRIBUTE].input is not vars(attention(other).q_proj)[ATTRIBUTE].input
        peftkernels.stats(other, reset=True)
        torch.testing.assert_close(logits(other), logits(model))
        logits(other)
        assert shared(other) == 2 * SHARED


@torch.no_grad()
def test_siblings_do_not_keep_each_other_alive(impl: str) -> None:
    """The memory of a module goes with its last reference, not with the garbage collector."""
    _, here, x = learned(impl)
    here.q_proj(x)
    here.k_proj(x)
    here.v_proj(x)
    watched = [weakref.ref(module) for module in (here.q_proj, here.k_proj)]
    gc.collect()
    gc.disable()
    try:
        here.q_proj = here.k_proj = nn.Identity()
        assert [one() for one in watched] == [None, None]
    finally:
        gc.enable()


@torch.inference_mode()
def test_tensors_that_do_not_count_their_writes(impl: str) -> None:
    model = adapted("lora")
    peftkernels.apply_to_peft(model, impl=impl)
    first = logits(model)
    assert torch.equal(logits(model), first)
    assert shared(model) == 0


def test_steps_are_counted_once_however_many_models_are_patched() -> None:
    for _ in range(2):
        peftkernels.apply_to_peft(adapted("lora"))
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    before = steps_made()
    torch.optim.SGD([weight], lr=1.0).step()
    assert steps_made() == before + 1
