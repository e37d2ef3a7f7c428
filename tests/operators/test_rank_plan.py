"""RankPlan: what the tensors hold, and that updates happen in place."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftkernels import RankPlan, RankState

states = st.lists(st.integers(0, 2), max_size=60)


def _uint8(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def _assert_consistent(plan: RankPlan, expected: list[int]) -> None:
    """`order` is ACTIVE, PROBE, DEAD, each ascending, and `counts` the first two cumulated, spelled out in Python."""
    ranks = range(len(expected))
    order = [i for state in (2, 1, 0) for i in ranks if expected[i] == state]
    active, probe = expected.count(2), expected.count(1)
    for value, dtype, content in (
        (plan.state, torch.uint8, expected),
        (plan.order, torch.int32, order),
        (plan.counts, torch.int32, [active, active + probe]),
    ):
        assert value.dtype == dtype
        assert value.tolist() == content
        assert value.is_contiguous()


def test_states_are_ordered_by_what_they_do() -> None:
    assert [(state.name, int(state)) for state in RankState] == [("DEAD", 0), ("PROBE", 1), ("ACTIVE", 2)]


@given(state=states)
def test_from_state(state: list[int]) -> None:
    _assert_consistent(RankPlan.from_state(_uint8(state)), state)


@given(mask=st.lists(st.booleans(), max_size=60), masked=st.sampled_from([RankState.PROBE, RankState.DEAD]))
def test_from_mask(mask: list[bool], masked: RankState) -> None:
    plan = RankPlan.from_mask(torch.tensor(mask, dtype=torch.bool), masked)
    _assert_consistent(plan, [2 if kept else int(masked) for kept in mask])


def test_from_mask_masks_with_probe() -> None:
    _assert_consistent(RankPlan.from_mask(torch.tensor([True, False])), [2, 1])


@given(pair=st.integers(0, 60).flatmap(lambda r: st.tuples(*[st.lists(st.integers(0, 2), min_size=r, max_size=r)] * 2)))
def test_update_is_in_place(pair: tuple[list[int], list[int]]) -> None:
    before, after = pair
    plan = RankPlan.from_state(_uint8(before))
    tensors = (plan.state, plan.order, plan.counts)
    places = [value.data_ptr() for value in tensors]
    versions = [value._version for value in tensors]
    assert plan.update_(_uint8(after)) is plan
    _assert_consistent(plan, after)
    assert all(kept is value for kept, value in zip((plan.state, plan.order, plan.counts), tensors, strict=True))
    assert [value.data_ptr() for value in tensors] == places
    assert all(value._version > version for value, version in zip(tensors, versions, strict=True))


def test_from_state_copies() -> None:
    state = _uint8([2, 0, 1])
    plan = RankPlan.from_state(state)
    state.fill_(0)
    _assert_consistent(plan, [2, 0, 1])


def test_a_strided_state_is_taken_by_value() -> None:
    wide = _uint8([2, 9, 0, 9, 1, 9])
    _assert_consistent(RankPlan.from_state(wide[::2]), [2, 0, 1])
    _assert_consistent(RankPlan.from_state(_uint8([0, 0, 0])).update_(wide[::2]), [2, 0, 1])


def test_the_constructor_wraps_without_copying() -> None:
    tensors = _uint8([2, 1]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    plan = RankPlan(*tensors)
    assert all(kept is value for kept, value in zip((plan.state, plan.order, plan.counts), tensors, strict=True))


def test_a_copied_plan_is_independent() -> None:
    plan = RankPlan.from_state(_uint8([2, 1, 0]))
    twin = copy.deepcopy(plan)
    plan.update_(_uint8([0, 0, 2]))
    _assert_consistent(twin, [2, 1, 0])


def test_repr_shows_the_states() -> None:
    assert "[2, 0]" in repr(RankPlan.from_state(_uint8([2, 0])))


NOT_STATES: dict[str, tuple[Any, type[Exception], str]] = {
    "a_list": ([2, 1], TypeError, "state: found list, expected a uint8 tensor of shape (r,)"),
    "bool": (torch.ones(2, dtype=torch.bool), TypeError, "state: found dtype torch.bool, expected torch.uint8"),
    "int64": (torch.ones(2, dtype=torch.int64), TypeError, "state: found dtype torch.int64, expected torch.uint8"),
    "matrix": (torch.ones(2, 1, dtype=torch.uint8), ValueError, "state: found shape (2, 1), expected (r,)"),
    "scalar": (torch.tensor(1, dtype=torch.uint8), ValueError, "state: found shape (), expected (r,)"),
}


@pytest.mark.parametrize(("state", "error", "message"), NOT_STATES.values(), ids=NOT_STATES)
@pytest.mark.parametrize("method", ["from_state", "update_"])
def test_what_is_no_state(state: Any, error: type[Exception], message: str, method: str) -> None:
    plan = RankPlan.from_state(_uint8([2, 1]))
    with pytest.raises(error, match=re.escape(message)):
        getattr(plan, method)(state)
    _assert_consistent(plan, [2, 1])


@pytest.mark.parametrize("value", [3, 17, 255])
def test_a_value_that_is_no_state(value: int) -> None:
    message = f"state: found value {value}, expected 0 (DEAD), 1 (PROBE) or 2 (ACTIVE)"
    with pytest.raises(ValueError, match=re.escape(message)):
        RankPlan.from_state(_uint8([2, value, 0]))


@pytest.mark.parametrize("values", [[2], [2, 1, 0]])
def test_update_with_another_number_of_ranks(values: list[int]) -> None:
    plan = RankPlan.from_state(_uint8([2, 1]))
    with pytest.raises(ValueError, match=re.escape(f"state: found shape ({len(values)},), expected (2,)")):
        plan.update_(_uint8(values))


def test_update_from_another_device() -> None:
    plan = RankPlan.from_state(_uint8([2, 1]))
    with pytest.raises(ValueError, match="state: found device meta, expected cpu"):
        plan.update_(torch.ones(2, dtype=torch.uint8, device="meta"))


NOT_MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "a_list": ([True], TypeError, "mask: found list, expected a torch.bool tensor of shape (r,)"),
    "uint8": (torch.ones(2, dtype=torch.uint8), TypeError, "mask: found torch.uint8, expected a torch.bool tensor"),
    "matrix": (torch.ones(2, 2, dtype=torch.bool), ValueError, "mask: found shape (2, 2), expected (r,)"),
}


@pytest.mark.parametrize(("mask", "error", "message"), NOT_MASKS.values(), ids=NOT_MASKS)
def test_what_is_no_mask(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RankPlan.from_mask(mask)


def test_masked_must_be_a_state() -> None:
    with pytest.raises(ValueError, match="7 is not a valid RankState"):
        RankPlan.from_mask(torch.tensor([True, False]), masked=7)


def test_an_empty_plan() -> None:
    _assert_consistent(RankPlan.from_state(_uint8([])), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": [2, 2]}, "state: found list, expected"),
        ({"state": torch.ones(2)}, r"state: found dtype torch\.float32, expected torch\.uint8"),
        ({"state": torch.ones(1, 2, dtype=torch.uint8)}, r"state: found shape \(1, 2\), expected \(r,\)"),
        ({"order": torch.tensor([0, 1])}, r"order: found dtype torch\.int64, expected torch\.int32"),
        ({"order": torch.tensor([0], dtype=torch.int32)}, r"order: found shape \(1,\), expected \(2,\)"),
        ({"counts": torch.tensor([2], dtype=torch.int32)}, r"counts: found shape \(1,\), expected \(2,\)"),
        ({"counts": torch.tensor([2.0, 2.0])}, r"counts: found dtype torch\.float32, expected torch\.int32"),
        (
            {"order": torch.zeros(2, dtype=torch.int32, device="meta")},
            "order: found device meta, expected state's, cpu",
        ),
    ],
)
def test_a_plan_of_other_tensors_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = RankPlan.from_mask(torch.ones(2, dtype=torch.bool))
    with pytest.raises((TypeError, ValueError), match="^" + message):
        RankPlan(**{"state": plan.state, "order": plan.order, "counts": plan.counts, **changes})
