"""Whatever is missing from a policy's saved state, or is of another kind: refused by name, the policy as it was."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from saved_runs import assert_same_bits
from small_models import adapter_layers, draw_gradients
from torch import Tensor

from peftkernels.allocation import AdaLoraAllocator, RollbackPolicy, Snapshots
from peftkernels.allocation.policies.accumulation import NoiseScale
from peftkernels.allocation.policies.freezing import LayerFreezing
from peftkernels.allocation.policies.learning_rate import LearningRatePriorities, LearningRateScale, module_groups
from peftkernels.allocation.policies.module_average import ModuleGradientAverage
from peftkernels.allocation.run.json_tensor import METADATA, encode

GONE = object()
VALUES = (GONE, None, -1, True, 1.5, float("nan"), float("inf"), 10**30, "x", [], ["x"], {}, {"x": 1})

# Of the values above, those that may stand at a place: it is named by its last key.
RIGHT: dict[str, tuple[Any, ...]] = {
    "mean": (-1, 1.5, 10**30),
    "variance": (1.5, 10**30),
    "peaks[0]": (1.5, 10**30),
    "layer0": (1.5, 10**30),
    "layer1": (1.5, 10**30),
    "layer2": (1.5, 10**30),
    "decided": (None,),
    "to": (None,),
    "why": ("x",),
    "alarmed": (True,),
    "above.loss": ([],),
    "above.churn": ([],),
    "learned": ([],),
    "events": ([],),
    "multipliers": ({},),
}
# Where the facts and the tensors of a snapshot disagree, the error names the tensor.
TENSORS = {"tensors": "moments.", "values": "moments.", "snapshots": "state.metadata"}


class _Run:
    """Three layers under an optimizer and an allocator, and one policy; the loss leaves its band where asked."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.layers = adapter_layers((8, 9), (10, 9), (7, 5))
        self.allocator = AdaLoraAllocator(self.layers, total_step=60, target_r=2, tinit=2, tfinal=5)
        self.optimizer = torch.optim.AdamW(module_groups(self.layers, lr=1e-3))
        self.allocator.attach(self.optimizer)
        self.policy = self._policy(kind)

    def _policy(self, kind: str) -> Any:
        if kind == "rollback":
            policy: Any = RollbackPolicy(Snapshots(self.allocator, every=2, last=2), warmup=3)
        elif kind == "snapshots":
            policy = Snapshots(self.allocator, every=2, last=2)
        elif kind == "average":
            policy = ModuleGradientAverage(0.9)
            self.allocator.add_callback(policy.update)
            return policy
        elif kind == "noise":
            policy = NoiseScale(self.layers)
        elif kind == "freezing":
            policy = LayerFreezing(start=1)
        else:
            policy = LearningRatePriorities() if kind == "priorities" else LearningRateScale()
            policy.attach(self.allocator)
            return policy
        self.allocator.add_callback(policy)
        return policy

    def advance(self, losses: list[float]) -> None:
        for loss in losses:
            self.allocator.observe(loss)
            for _ in range(2):
                draw_gradients(self.layers)
                if isinstance(self.policy, NoiseScale):
                    self.policy.micro_batch(4)
            self.optimizer.step()


KINDS = ("rollback", "snapshots", "average", "noise", "freezing", "priorities", "scale")
# A rollback, and a number above the band at the end.
LOSSES = [1.0, 1.1, 0.9, 1.0, 1.0, float("nan"), 1.0, 1.0, 9.0]


def _damaged(value: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """(place, its last key, the whole with the damage) for everything inside a mapping, a list or a tensor."""
    if isinstance(value, dict):
        for key, inner in value.items():
            short = f"{name}.{key}" if name == "above" else str(key)
            # A module without a multiplier has 1.
            if name != "multipliers":
                yield f"{key} gone", key, {k: v for k, v in value.items() if k != key}
            if key in (METADATA, f"snapshots.{METADATA}"):
                facts = json.loads(bytes(inner.tolist()))
                for place, last, changed in _damaged(facts, ""):
                    yield f"{key}: {place}", last, {**value, key: encode(changed)}
            else:
                for place, last, changed in _damaged(inner, short):
                    yield f"{key} > {place}", last or key, {**value, key: changed}
        yield "another key", "another", {**value, "another": 1}
    elif isinstance(value, list) and value:
        for place, last, changed in _damaged(value[0], f"{name}[0]"):
            yield f"[0] > {place}", last, [changed, *value[1:]]
    elif isinstance(value, Tensor):
        for other in (value.unsqueeze(0), value.to(torch.complex64), value.to(torch.int16), None, "x", 1, [1]):
            yield f"as {getattr(other, 'dtype', other)} {getattr(other, 'shape', '')}", "", other
        return
    for other in VALUES:
        right = any(type(one) is type(other) and one == other for one in RIGHT.get(name, ()))
        if other is not GONE and not right and not (type(other) is type(value) and other == value):
            yield f"{name} = {other!r}", "", other


def _run(kind: str, seed: int, losses: list[float]) -> _Run:
    run = _Run(kind, seed)
    run.advance(losses)
    return run


@pytest.mark.filterwarnings("ignore:a step had gradients", "ignore:the scores at step")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_of_a_policy_is_refused_by_name_and_changes_nothing(kind: str) -> None:
    state = _run(kind, 0, LOSSES).policy.state_dict()
    own = _run(kind, 1, LOSSES[:5])
    before = copy.deepcopy(own.policy.state_dict())
    tried, faults = 0, []
    for place, last, damaged in _damaged(state, "state"):
        if kind == "average" and damaged == {}:
            # As before the first step.
            continue
        tried += 1
        try:
            own.policy.load_state_dict(damaged)
        except ValueError as error:
            named = re.sub(r"^(snapshots\.)?(\d+\.)?(state\.)?", "", last)
            said = any(name in str(error) for name in (named, TENSORS.get(named, named)))
            if not str(error).startswith("state") or not said:
                faults.append(f"{place}: {error}")
        except Exception as error:
            faults.append(f"{place}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{place}: taken over")
        try:
            assert_same_bits(own.policy.state_dict(), before)
        except Exception:
            faults.append(f"{place}: changed")
            own = _run(kind, 1, LOSSES[:5])
    assert not faults, f"{len(faults)} of {tried}:\n" + "\n".join(faults[:40])
    assert tried > 20
    own.policy.load_state_dict(state)
    assert_same_bits(own.policy.state_dict(), state)
    own.advance([1.0, 1.0])


def test_multipliers_of_other_modules_are_refused_by_the_policy_or_when_it_is_attached() -> None:
    state = {"multipliers": {"layer0": 2.0, "elsewhere": 0.5}}
    with pytest.raises(ValueError, match=r"state: multipliers\['elsewhere'\]: found an unknown module"):
        _Run("scale", 0).policy.load_state_dict(state)
    run, policy = _Run("average", 0), LearningRateScale()
    policy.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: multipliers\['elsewhere'\]: found an unknown module"):
        policy.attach(run.allocator)
    run.advance([1.0])
    policy.load_state_dict({"multipliers": {"layer0": 2.0}})
    policy.attach(run.allocator)
    assert policy.current == {"layer0": 2.0}


def test_multipliers_saved_under_the_names_of_a_wrapped_model_are_taken_over() -> None:
    policy = _Run("scale", 0).policy
    policy.load_state_dict({"multipliers": {"module._orig_mod.layer0": 2.0, "module._orig_mod.layer2": 0.5}})
    assert policy.current == {"layer0": 2.0, "layer2": 0.5}


@pytest.mark.parametrize("kind", ["freezing", "priorities", "average"])
def test_averages_of_another_number_of_modules_are_refused_before_they_are_used(kind: str) -> None:
    saved = _run(kind, 0, LOSSES[:3]).policy.state_dict()
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=60, target_r=2)
    policy: Any = {"freezing": LayerFreezing, "priorities": LearningRatePriorities}.get(kind, ModuleGradientAverage)
    policy = policy(0.9) if kind == "average" else policy()
    policy.load_state_dict(saved)
    allocator.add_callback(policy.update if kind == "average" else policy)
    draw_gradients(layers)
    with pytest.raises(ValueError, match="state: found averages of 3 modules, expected 1"):
        allocator.step()


def test_a_snapshot_without_all_factors_is_refused() -> None:
    run = _Run("snapshots", 0)
    run.allocator.detach()
    draw_gradients(run.layers)
    run.allocator.step()
    state = run.policy.state_dict()
    facts = json.loads(bytes(state[METADATA].tolist()))
    assert facts["snapshots"][0] == {"step": 1, "parameters": 9, "moments": None}
    facts["snapshots"][0]["parameters"] = 8
    damaged = {name: value for name, value in state.items() if name != "0.parameters.8"}
    with pytest.raises(
        ValueError, match="state: snapshot 0: token: found 8 parameters, expected at least the 9 factors"
    ):
        run.policy.load_state_dict({**damaged, METADATA: encode(facts)})
    run.policy.load_state_dict(state)
