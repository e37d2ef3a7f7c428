"""Processes that drift apart are found out, and told where."""

from __future__ import annotations

import pytest
import torch
from processes import Processes
from runs import STEPS, Training, build

from peftkernels.distributed import DivergenceCheck, average_loss, check_agreement


def perturbed(process: int, culprit: int, factor: str, scale: float, every: int) -> tuple[str, int]:
    """What is raised, and after which step, when one process's gradient is another in step 6."""
    training = Training("ddp", process, 2)
    training.allocator.add_callback(DivergenceCheck(every))

    def disturb(step: int) -> None:
        if step == 6 and process == culprit:
            getattr(training.inner.second, factor).grad.view(-1)[0].mul_(scale)

    for step in range(1, STEPS + 1):
        try:
            training.run(step, step, disturb)
        except RuntimeError as error:
            return str(error), step
    return "", STEPS


@pytest.mark.parametrize(
    ("culprit", "factor", "scale", "every", "found_at", "expected"),
    [
        pytest.param(1, "lora_A", 1.5, 1, 6, "score of 'second'", id="A's gradient"),
        pytest.param(0, "lora_E", 1 + 1e-12, 1, 6, "'second'", id="the last bits of a gate's gradient"),
        pytest.param(1, "lora_B", 30.0, 4, 8, "'second'", id="looked at every fourth step"),
    ],
)
def test_a_perturbed_gradient_is_named_on_every_process(
    pair: Processes, culprit: int, factor: str, scale: float, every: int, found_at: int, expected: str
) -> None:
    (first, step), (second, other_step) = pair.run(perturbed, culprit, factor, scale, every)
    assert first == second
    assert step == other_step == found_at
    assert f"step {found_at}: the processes have diverged: process 1 differs from process 0 in " in first
    assert expected in first


def test_processes_that_agree_raise_nothing(pair: Processes) -> None:
    for message, step in pair.run(perturbed, 1, "lora_A", 1.0, 1):
        assert (message, step) == ("", STEPS)


def other_gate(process: int) -> str:
    training = Training("one", process, 2)
    if process == 1:
        with torch.no_grad():
            training.inner.third.lora_E[0] = torch.nextafter(training.inner.third.lora_E[0], torch.ones(1).double())
    try:
        check_agreement(training.allocator)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_gate_that_differs_in_its_last_bit(pair: Processes) -> None:
    expected = "step 0: the processes have diverged: process 1 differs from process 0 in gate of 'third'"
    assert pair.run(other_gate) == [expected, expected]


def other_step(process: int) -> str:
    training = Training("one", process, 2)
    training.run(1, 1 + process)
    try:
        check_agreement(training.allocator)
    except RuntimeError as error:
        return str(error)
    return ""


def test_processes_at_different_steps(pair: Processes) -> None:
    for message in pair.run(other_step):
        assert message == "the processes are not at the same step: found process 0 at step 1, process 1 at step 2"


def one_of_three(process: int) -> str:
    training = Training("one", process, 3)
    if process == 1:
        training.allocator.masks.keep[0] = False
        with torch.no_grad():
            training.inner.second.lora_E[3] += 1.0
    try:
        check_agreement(training.allocator)
    except RuntimeError as error:
        return str(error)
    return ""


def test_three_processes(three: Processes) -> None:
    """Of three processes the one that differs from the two others is named, whichever it is."""
    expected = (
        "step 0: the processes have diverged: process 1 differs from most others in mask of 'first'; "
        "process 1 differs from most others in gate of 'second'"
    )
    assert three.run(one_of_three) == [expected] * 3


def mean_of_losses(process: int) -> float:
    return float(average_loss(torch.tensor(1.0 + process, requires_grad=True)))


def test_the_mean_of_the_losses(pair: Processes) -> None:
    assert pair.run(mean_of_losses) == [1.5, 1.5]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="every: found 0"):
        DivergenceCheck(0)
    with pytest.raises(TypeError, match=r"every: found 1\.5"):
        DivergenceCheck(1.5)  # type: ignore[arg-type]
    training = Training("one")
    assert training.inner.head.weight.equal(build().head.weight)
    with pytest.raises(ValueError, match="kinds: found 'factor'"):
        check_agreement(training.allocator, kinds=("mask", "factor"))
