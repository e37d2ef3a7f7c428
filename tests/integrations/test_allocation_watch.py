"""Noticing AdaLoRA that is trained without allocation."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from peftkernels.integrations.peft.watch import AllocationWatch


def _warnings_of(watch: AllocationWatch, forwards: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(forwards):
            watch.forward()
    return [str(warning.message) for warning in caught]


def test_warns_once_after_so_many_forwards_and_names_the_callback() -> None:
    watch = AllocationWatch()
    assert _warnings_of(watch, 19) == []
    told = _warnings_of(watch, 30)
    assert len(told) == 1
    assert "20 steps" in told[0] and "peftkernels.integrations.transformers.AdaLoraCallback" in told[0]
    assert _warnings_of(watch, 100) == []


def test_an_allocation_begins_the_count_anew() -> None:
    watch = AllocationWatch(patience=3)
    for _ in range(5):
        assert _warnings_of(watch, 2) == []
        watch.allocated()
    assert len(_warnings_of(watch, 3)) == 1


def test_forwards_without_gradients_do_not_count() -> None:
    watch = AllocationWatch(patience=1)
    with torch.no_grad():
        assert _warnings_of(watch, 5) == []
    assert len(_warnings_of(watch, 1)) == 1


def test_accumulated_batches_count_once_where_gates_are_given() -> None:
    gates = [torch.zeros(2, 1, requires_grad=True) for _ in range(2)]
    watch = AllocationWatch(patience=3)

    def train(steps: int) -> None:
        for _ in range(steps):
            for _ in range(8):
                watch.forward(gates)
            with torch.no_grad():
                gates[1].add_(1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(3)
    with pytest.warns(UserWarning, match="3 steps without a call of update_and_allocate"):
        train(1)


def test_fused_optimizers_are_seen() -> None:
    """They do not tell by the version that they wrote a parameter."""
    gates = [torch.zeros(2, 1, requires_grad=True)]
    optimizer = torch.optim.AdamW(gates, lr=1.0, fused=True)
    watch = AllocationWatch(patience=2)
    for step in range(3):
        if step == 2:
            assert gates[0]._version == 0
            with pytest.warns(UserWarning, match="2 steps without a call of update_and_allocate"):
                watch.forward(gates)
        else:
            watch.forward(gates)
        gates[0].grad = torch.ones(2, 1)
        optimizer.step()


def test_travels_with_a_model() -> None:
    watch = AllocationWatch(patience=2)
    watch.forward()
    for travelled in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert len(_warnings_of(travelled, 1)) == 1


@pytest.mark.parametrize("patience", [0, 1.5, True])
def test_patience_is_checked(patience: object) -> None:
    with pytest.raises(ValueError, match="patience: found"):
        AllocationWatch(patience)  # type: ignore[arg-type]


def test_gates_that_are_others_at_the_same_place_were_not_seen_before() -> None:
    """Freed gates give their addresses to new ones, whose versions are the same."""
    watch = AllocationWatch(patience=5)

    def train(steps: int) -> None:
        for _ in range(steps):
            watch.forward([torch.zeros(2, 1, requires_grad=True)])

    train(5)
    with pytest.warns(UserWarning, match="5 steps without a call of update_and_allocate"):
        train(1)


def test_gates_that_were_made_in_inference_mode_count_no_writes() -> None:
    with torch.inference_mode():
        gates = [torch.zeros(2, 1)]
    watch = AllocationWatch(patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            watch.forward(gates)


def test_a_watch_that_has_seen_gates_travels_too() -> None:
    watch = AllocationWatch(patience=2)
    gates = [torch.zeros(2, 1, requires_grad=True)]
    watch.forward(gates)
    for travelled in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        travelled.forward(gates)
        assert len(_warnings_of(travelled, 2)) == 1
