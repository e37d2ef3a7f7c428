"""The communication hook sends the gradients of live ranks, no others, and changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Processes
from runs import LAYERS, RANKS, STEPS, Training, build, run_whole

from peftkernels.distributed import LiveRanks
from peftkernels.ops.rank_plan import RankState


def elements(states: list[int], model: torch.nn.Module) -> int:
    """How many numbers a step must send while the ranks are in these states."""
    count = sum(parameter.numel() for parameter in model.head.parameters())
    start = 0
    for name, rank in zip(LAYERS, RANKS, strict=True):
        layer = model.get_submodule(name)
        own = states[start : start + rank]
        start += rank
        active = own.count(RankState.ACTIVE)
        count += active * (layer.in_features + layer.out_features) + active + own.count(RankState.PROBE)
    return count


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="probe ranks"),
        pytest.param({"compact": True}, id="dead ranks"),
        pytest.param({"dtype": torch.float32, "deltaT": 3, "compact": True}, id="all ranks between masks"),
        pytest.param({"closed_form": True, "compact": True}, id="term in closed form"),
    ],
)
def test_results_are_those_of_plain_ddp_to_the_bit(pair: Processes, settings: dict[str, Any]) -> None:
    plain, _ = pair.run(run_whole, "ddp", **settings)
    for record in pair.run(run_whole, "hook", **settings):
        assert record.masks == plain.masks
        assert all(torch.equal(record.factors[name], expected) for name, expected in plain.factors.items())


def gradients_of_a_step(process: int, how: str, last: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The states of the ranks after step `last`, and the gradients of the next step as the optimizer sees them."""
    training = Training(how, process, 2, compact=True)
    before = training.run(1, last).masks[-1]
    found: dict[str, torch.Tensor] = {}

    def take(step: int) -> None:
        for name, parameter in training.inner.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    training.run(last + 1, last + 1, take)
    return before, found


@pytest.mark.parametrize(("last", "masked"), [(6, RankState.PROBE), (9, RankState.DEAD)])
def test_gradients_are_those_of_plain_ddp_to_the_bit(pair: Processes, last: int, masked: RankState) -> None:
    (states, plain), _ = pair.run(gradients_of_a_step, "ddp", last)
    for own, found in pair.run(gradients_of_a_step, "hook", last):
        assert own == states
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    gates = torch.cat([plain[f"{name}.lora_E"].flatten() for name in LAYERS])
    of_masked = gates[torch.tensor(states) == int(masked)]
    assert len(of_masked) > 3
    assert bool((of_masked != 0).any()) == (masked == RankState.PROBE)


@pytest.mark.parametrize("compact", [False, True])
def test_only_live_ranks_are_sent(pair: Processes, compact: bool) -> None:
    model = build()
    everything_that_trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    records = pair.run(run_whole, "hook", compact=compact)
    for record in records:
        before = [[int(RankState.ACTIVE)] * sum(RANKS), *record.masks[:-1]]
        assert [sum(sent) for sent in record.sent] == [elements(states, model) for states in before]
    everything, least = sum(records[0].sent[0]), sum(records[0].sent[-1])
    assert everything == everything_that_trains
    # 6 of 13 ranks are left.
    assert least < 0.6 * everything


def reads(process: int) -> list[int]:
    """How often masks were compared, which reads the device, by step, for a decision every third step."""
    from peftkernels.distributed import live_ranks

    counts: list[int] = []
    original = live_ranks.check_agreement

    def counting(*arguments: Any, **keywords: Any) -> None:
        counts[-1] += 1
        original(*arguments, **keywords)

    live_ranks.check_agreement = counting
    try:
        training = Training("hook", process, 2, deltaT=3, compact=True)
        for step in range(1, STEPS + 1):
            counts.append(0)
            training.run(step, step)
    finally:
        live_ranks.check_agreement = original
    return counts


def test_masks_are_read_once_per_change(pair: Processes) -> None:
    """Of 12 steps: the first, those after the masks of steps 3, 6 and, the last one, 8, and those after a mask is
    lifted."""
    first, second = pair.run(reads)
    assert first == second
    assert [step for step, count in enumerate(first, start=1) if count] == [1, 4, 5, 7, 8, 9]
    assert max(first) == 1


def diverging(process: int) -> str:
    """What is raised when one process's masks are others before gradients are packed."""
    training = Training("hook", process, 2)
    training.run(1, 5)
    if process == 1:
        # In the allocator: DDP gives every process the buffers of the first before each forward pass.
        training.allocator.masks.keep[RANKS[0]] ^= True
    try:
        training.run(6, 6)
    except RuntimeError as error:
        return str(error)
    return ""


def test_masks_that_differ_are_refused_before_packing(pair: Processes) -> None:
    for message in pair.run(diverging):
        assert "step 5: the processes have diverged" in message
        assert "process 1 differs from process 0 in mask of 'second'" in message
    pair.end()


def test_allocators_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="capturable"):
        LiveRanks(Training("one", capturable=True).allocator)


def test_parameters_at_the_addresses_of_freed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model is trained under the same hook: positions are those of its parameters."""
    ranks = LiveRanks(Training("one").allocator)
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(ranks, "_follow_masks", lambda: None)
    monkeypatch.setattr(ranks, "_positions", lambda parameters, *given: asked.append(parameters[0].detach().clone()))
    buffer = torch.zeros(4)
    seen, again = set(), 0
    for turn in range(50):
        parameter = torch.full((4,), float(turn))
        again += id(parameter) in seen
        seen.add(id(parameter))
        for _ in range(2):
            ranks.live_elements([parameter], [buffer], buffer)
        assert len(asked) == turn + 1
        assert float(asked[-1][0]) == turn
        del parameter
    assert again, "no address was used twice"
