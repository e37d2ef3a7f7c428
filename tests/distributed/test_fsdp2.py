"""FSDP2: the allocator over sharded factors decides as it does over whole ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from runs import LAYERS, STEPS, TOTAL, Training, batch, build, run_whole, states, whole_parameters
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.allocation.layers.sharding import gather
from peftkernels.ops.rank_plan import RankState


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="term in the loss"),
        pytest.param({"closed_form": True, "deltaT": 3, "compact": True, "exact_budget": True}, id="in closed form"),
        pytest.param({"strategy": "magnitude", "mesh_shape": (1, 2)}, id="by magnitude, in one copy"),
        pytest.param({"strategy": "gate", "mesh_shape": (2, 1)}, id="by the gates' gradients, in two copies"),
    ],
)
def test_sharded_runs_decide_as_one_process(pair: Processes, settings: dict[str, Any]) -> None:
    one = run_whole(0, "one", 1, **{name: value for name, value in settings.items() if name != "mesh_shape"})
    first, second = pair.run(run_whole, "fsdp2", **settings)
    assert len({tuple(mask) for mask in one.masks}) > 2, "the run decides nothing"
    assert first.masks == second.masks == one.masks
    assert first.norms == pytest.approx(one.norms, rel=1e-9)
    for name, expected in one.factors.items():
        assert torch.equal(first.factors[name], second.factors[name]), name
        torch.testing.assert_close(first.factors[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"dtype": torch.float32}, id="float32"),
        pytest.param({"dtype": torch.bfloat16}, id="a bfloat16 base beside factors in float32, as peft has it"),
        pytest.param(
            {"dtype": torch.float32, "policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
            id="float32 shards gathered in bfloat16",
        ),
    ],
)
def test_lower_precisions(pair: Processes, settings: dict[str, Any]) -> None:
    """Rounding may decide otherwise than in one process; the processes decide alike."""
    first, second = pair.run(run_whole, "fsdp2", **settings)
    assert first.masks == second.masks
    assert sum(state == RankState.ACTIVE for state in first.masks[-1]) == TOTAL
    for name, factor in first.factors.items():
        assert torch.equal(factor, second.factors[name]), name
        assert torch.isfinite(factor).all()


def warnings_of_a_step(process: int, dtype: torch.dtype) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Training("fsdp2", process, 2, dtype=dtype).run(1, 1)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_output_is_no_view(pair: Processes, dtype: torch.dtype) -> None:
    """FSDP2 warns of modules that return one: what is added to it in place would lose the hook set on it."""
    for messages in pair.run(warnings_of_a_step, dtype):
        assert not [message for message in messages if "returned a view" in message]


def replicated_run(process: int) -> tuple[Any, bool, bool]:
    training = Training("replicated", process, 2, clip=False, compact=True)
    whole = not any(isinstance(getattr(training.inner.first, name), DTensor) for name in ("lora_A", "lora_B", "lora_E"))
    sharded = isinstance(training.inner.first.base_layer.weight, DTensor)
    return training.run(1, STEPS), whole, sharded


def test_replicated_adapters_beside_a_sharded_model(pair: Processes) -> None:
    one = run_whole(0, "one", 1, clip=False, compact=True)
    (first, whole, sharded), (second, *_) = pair.run(replicated_run)
    assert whole and sharded
    assert first.masks == second.masks == one.masks
    for name, expected in one.factors.items():
        assert torch.equal(first.factors[name], second.factors[name]), name
        torch.testing.assert_close(first.factors[name], expected, rtol=1e-9, atol=1e-12)
    assert sum(first.sent[-1]) < 0.6 * sum(first.sent[0])


WHOLE = StateDictOptions(full_state_dict=True)


def saved_halfway(process: int, how: str, processes: int, step: int) -> dict[str, Any]:
    training = Training(how, process, processes)
    training.run(1, step)
    return {
        "allocator": training.allocator.state_dict(),
        "model": get_model_state_dict(training.model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer, options=WHOLE),
    }


def resumed(process: int, how: str, processes: int, step: int, saved: list[dict[str, Any]]) -> Any:
    """The steps after `step`; each process loads the allocator's state that the process before it saved."""
    training = Training(how, process, processes)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes > 1)
    # Only the first process keeps a whole state of model and optimizer.
    set_model_state_dict(training.model, saved[0]["model"] if process == 0 else {}, options=broadcast)
    optimizer_state = saved[0]["optimizer"] if process == 0 else {}
    set_optimizer_state_dict(training.model, training.optimizer, optimizer_state, options=broadcast)
    training.allocator.load_state_dict(saved[process - 1 if len(saved) > 1 else 0]["allocator"])
    return training.run(step + 1, STEPS)


@pytest.mark.parametrize("step", [5, 9])
def test_state_is_whole_and_resumes_on_another_number_of_processes(pair: Processes, step: int) -> None:
    one = run_whole(0, "one", 1)
    sharded = pair.run(saved_halfway, "fsdp2", 2, step)
    alone = [saved_halfway(0, "one", 1, step)]
    for state in sharded:
        assert state["allocator"].keys() == alone[0]["allocator"].keys()
        assert all(value.shape == alone[0]["allocator"][name].shape for name, value in state["allocator"].items())
        assert not any(isinstance(value, DTensor) for value in state["allocator"].values())
    continued = {
        "two on two": pair.run(resumed, "fsdp2", 2, step, sharded)[0],
        "two on one": resumed(0, "one", 1, step, sharded),
        "one on two": pair.run(resumed, "fsdp2", 2, step, alone)[0],
    }
    for how, record in continued.items():
        assert record.masks == one.masks[step:], how
        for name, expected in one.factors.items():
            torch.testing.assert_close(record.factors[name], expected, rtol=1e-9, atol=1e-12, msg=f"{how}: {name}")


def rolled_back(process: int) -> tuple[Any, Any]:
    training = Training("fsdp2", process, 2)
    training.run(1, 5)
    token = training.allocator.snapshot()
    rest = {name: p.detach().clone() for name, p in training.inner.head.named_parameters()}
    moments = [{k: v.clone() for k, v in training.optimizer.state[p].items()} for p in training.inner.head.parameters()]
    once = training.run(6, 9).masks[5:], whole_parameters(training.inner)
    training.allocator.rollback(token, "again")
    with torch.no_grad():
        for (name, parameter), kept in zip(training.inner.head.named_parameters(), moments, strict=True):
            parameter.copy_(rest[name])
            for key, value in kept.items():
                training.optimizer.state[parameter][key].copy_(value)
    again = training.run(6, 9).masks[9:], whole_parameters(training.inner)
    return once, again


def test_rollback_of_sharded_factors_repeats_to_the_bit(pair: Processes) -> None:
    for (masks, factors), (masks_again, factors_again) in pair.run(rolled_back):
        assert masks == masks_again
        assert len(masks) == 4
        assert all(torch.equal(factors[name], factors_again[name]) for name in factors)


def frozen(process: int) -> tuple[list[list[int]], bool, bool]:
    training = Training("fsdp2", process, 2)
    training.run(1, 4)
    training.allocator.freeze("second")
    before = whole_parameters(training.inner)
    masks = training.run(5, 9).masks
    after = whole_parameters(training.inner)
    held = all(torch.equal(before[f"second.{name}"], after[f"second.{name}"]) for name in ("lora_A", "lora_B"))
    return masks, held, bool((after["second.lora_E"] == 0).all())


def test_a_frozen_layer_stays_as_it_is(pair: Processes) -> None:
    (masks, held, zero), other = pair.run(frozen)
    assert (masks, held, zero) == other
    assert held and zero
    assert masks[-1][5:12] == [RankState.DEAD] * 7


def after_evaluation(process: int) -> tuple[str, float, float]:
    """After a forward pass without a backward pass FSDP leaves whole parameters in the root module."""
    torch.manual_seed(0)
    inner = build()
    model = fully_shard(inner)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = AdaLoraAllocator(inner, total_step=10, target_r=None, budget=Training("one").allocator.settings.budget)
    allocator.attach(optimizer)
    token = allocator.snapshot()
    expected = float(allocator.regularization().detach())
    with torch.no_grad():
        model(batch(1, 0, 1)[0])
    assert not isinstance(inner.first.lora_A, DTensor)
    found = float(allocator.regularization().detach())
    try:
        allocator.rollback(token)
    except RuntimeError as error:
        model.reshard()
        allocator.rollback(token)
        return str(error), found, expected
    return "", found, expected


def test_writing_while_parameters_are_gathered_is_refused(pair: Processes) -> None:
    for message, found, expected in pair.run(after_evaluation):
        assert "found whole factors in the place of shards" in message
        assert "call reshard()" in message
        assert found == expected


class Log:
    """An observer that keeps the steps it was told of."""

    def __init__(self) -> None:
        self.modules: list[tuple[int, int]] = []
        self.steps: list[int] = []

    def on_start(self, facts: Any) -> None:
        self.modules = [(module["in_features"], module["out_features"]) for module in facts["modules"]]

    def on_decision(self, step: int, *_: Any) -> None:
        self.steps.append(step)

    def on_event(self, *_: Any) -> None:
        pass


def observed(process: int) -> tuple[list[int], list[tuple[int, int]], list[list[int]], int]:
    training = Training("fsdp2", process, 2)
    log = Log()
    if process == 0:
        training.allocator.add_observer(log)
    masks = training.run(1, 5).masks
    reported = training.allocator.explain().n_kept if process == 0 else 0
    return log.steps, log.modules, masks, reported


def test_one_process_may_watch_by_itself(pair: Processes) -> None:
    """What a log asks for is known on every process: nothing waits for those that do not ask."""
    (steps, modules, masks, reported), (*nothing, other_masks, _) = pair.run(observed)
    assert steps == [3, 4, 5]
    assert modules == [(12, 20), (20, 9), (9, 11)]
    assert nothing == [[], []]
    assert masks == other_masks
    assert reported == masks[-1].count(RankState.ACTIVE)


def gathered(process: int) -> bool:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(3)
    wholes = [torch.randn(rows, columns, generator=generator) for rows in (1, 2, 3, 5, 8) for columns in (1, 4)]
    wholes.append(torch.randn(3, 2, generator=generator).double())
    shards = [distribute_tensor(whole, mesh, [Shard(0)]) for whole in wholes]
    assert all(torch.equal(shard.full_tensor(), whole) for shard, whole in zip(shards, wholes, strict=True))
    plain = torch.randn(2, 2)
    found = gather([*shards, plain])
    return found[-1] is plain and all(torch.equal(a, b) for a, b in zip(found[:-1], wholes, strict=True))


def test_gather_is_full_tensor(pair: Processes) -> None:
    assert pair.run(gathered) == [True, True]


def other_placements(process: int) -> str:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = build()
    shard: Tensor = distribute_tensor(model.first.lora_A.detach(), mesh, [Shard(1)])
    model.first.lora_A = torch.nn.Parameter(shard)
    try:
        AdaLoraAllocator(model, total_step=10)
    except ValueError as error:
        return str(error)
    return ""


def test_other_placements_are_refused_by_name(pair: Processes) -> None:
    for message in pair.run(other_placements):
        assert "layers['first'].lora_A: found the placements (Shard(dim=1),)" in message


def sharded_later(process: int) -> tuple[str, list[int]]:
    inner = build()
    allocator = Training("one").allocator
    allocator = type(allocator)(inner, total_step=10, budget=allocator.settings.budget)
    model = fully_shard(inner)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    try:
        allocator.attach(optimizer)
    except RuntimeError as error:
        return str(error), states(inner)
    return "", states(inner)


def test_sharding_after_the_allocator_was_made_is_refused(pair: Processes) -> None:
    for message, found in pair.run(sharded_later):
        assert f"layers[{LAYERS[0]!r}]: found factors that were sharded after the allocator was made" in message
        assert set(found) == {int(RankState.ACTIVE)}
