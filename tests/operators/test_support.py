"""Machinery of the other tests: what is left out where kernels are interpreted, and calls moved with their strides."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.cases import make_call
from support.covering import covering, pairs
from support.devices import CPU, moved


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (7, 3, 5), (2, 2, 2, 2)], ids=str)
def test_every_pair_of_values_is_covered(sizes: tuple[int, ...]) -> None:
    names = "abcd"[: len(sizes)]
    every = [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]
    kept = covering(every)
    assert set().union(*(pairs(every[place]) for place in kept)) == set().union(*map(pairs, every))
    # No fewer can have all pairs of the two largest parameters; greedy takes a little more.
    least = sorted(sizes)[-1] * (sorted(sizes)[-2] if len(sizes) > 1 else 1)
    assert least <= len(kept) <= min(1.5 * least + 2, len(every))


def test_nothing_and_one_are_covered_by_themselves() -> None:
    assert covering([]) == []
    assert covering([{}]) == [0]


@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded", "offset", "empty"])
def test_moved_tensors_keep_values_and_strides(layout: str) -> None:
    values = torch.randn(6, 8)
    value = {
        "transposed": values.T,
        "every_second": values[::2, ::2],
        "expanded": values[:1].expand(6, 8),
        "offset": values[2:, 3:],
        "empty": values[:0],
    }[layout]
    there = moved(value, torch.device("meta"))
    assert (there.stride(), there.storage_offset(), there.shape) == (
        value.stride(),
        value.storage_offset(),
        value.shape,
    )
    assert there.device.type == "meta"
    assert moved(value, CPU) is value


def test_a_moved_call_moves_everything() -> None:
    call = make_call(1, plan=True, scaling="tensor", dropout_p=0.5).on(torch.device("meta"))
    assert call.rank_plan is not None
    everything = (*call.tensors().values(), call.grad_y, call.scaling, call.rank_plan.order, call.rank_plan.counts)
    assert {value.device.type for value in everything} == {"meta"}
