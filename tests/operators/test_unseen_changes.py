"""Frozen weights written where no version counter tells: what a call notices at once, and what it notices in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import Call, make_call, run
from support.checks import within_budget
from support.packs import count, fresh_cache, gained
from torch import Tensor

from peftkernels import lora_linear

SMALL = (64, 64)  # all of it is read again in every call
NEAR = (512, 96)  # a core's cache holds it: 64 bytes of each row in every call
FAR = (1100, 300)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _rows_for_all(shape: tuple[int, int], rows: int) -> int:
    """How many calls of so many rows read every element again."""
    per_call = min(rows, 128) if shape == NEAR else min(rows, 1024)
    return 2 * math.ceil((128 if shape == NEAR else 1024) / per_call)


def _call(seed: int, shape: tuple[int, int], rows: int, dtype: str = "fp32") -> Call:
    return make_call(seed, leading=(rows,), n=shape[0], k=shape[1], r=4, dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "rows"), [(SMALL, 1), (NEAR, 3), (FAR, 64)], ids=["small", "near", "far"])
def test_the_rows_of_new_tokens_written_through_data(shape: tuple[int, int], rows: int, dtype: str, seed: int) -> None:
    """Each row by itself, by the next call, in both passes."""
    call = _call(seed, shape, rows, dtype)
    run(call, "cpu")
    for row in range(0, shape[0], shape[0] // 16):
        call.weight.data[row] = 1.0 + row / shape[0]
        within_budget(call, "cpu")


@pytest.mark.parametrize(("shape", "rows"), [(SMALL, 1), (NEAR, 3), (FAR, 64)], ids=["small", "near", "far"])
def test_a_column_written_through_data(shape: tuple[int, int], rows: int, seed: int) -> None:
    call = _call(seed, shape, rows)
    run(call, "cpu")
    for column in range(0, shape[1], shape[1] // 8):
        call.weight.data[:, column] = 1.5
        within_budget(call, "cpu")


def test_rows_that_change_places(seed: int) -> None:
    call = _call(seed, NEAR, 3)
    run(call, "cpu")
    for first, second in ((0, 1), (0, 4), (100, 356), (0, 511)):
        call.weight.data[[first, second]] = call.weight.data[[second, first]]
        within_budget(call, "cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("shape", "rows"), [(SMALL, 1), (NEAR, 1), (NEAR, 40), (FAR, 1), (FAR, 30), (FAR, 1100)], ids=str
)
def test_one_element_is_found_in_time(shape: tuple[int, int], rows: int, backward: bool, seed: int) -> None:
    """Wherever it lies: by the next call where all is read, else by the time that all has been read once."""
    call = _call(seed, shape, rows)
    needs = ("x",) if backward else ()
    run(call, "cpu", needs)
    generator = torch.Generator().manual_seed(seed)
    limit = 1 if shape == SMALL or rows >= 1024 else _rows_for_all(shape, rows)
    for _ in range(6):
        row, column = (int(torch.randint(size, (), generator=generator)) for size in shape)
        call.weight.data[row, column] += 8.0
        for _ in range(limit):
            misses = gained(lambda: run(call, "cpu", needs))[1]
            if misses > 0:
                break
        assert misses > 0, f"element ({row}, {column}) was not found in {limit} calls"
        within_budget(call, "cpu")


def test_both_packs_are_made_anew(seed: int) -> None:
    call = _call(seed, SMALL, 2)
    run(call, "cpu")
    call.weight.data[3, 3] = 9.0
    assert gained(lambda: run(call, "cpu")) == (0, 2)
    assert gained(lambda: run(call, "cpu")) == (2, 0)
    assert count("entries") == 2


def test_a_change_between_the_packs_of_two_directions(seed: int) -> None:
    """The second pack is made of another weight than the first one, which is then not kept either."""
    call = _call(seed, FAR, 2)
    run(call, "cpu", ())
    call.weight.data[17, 123] = 9.0
    run(call, "cpu", ("x",))
    within_budget(call, "cpu")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda weight: weight.T.contiguous().T,
    "every_second_column": lambda weight: weight.repeat_interleave(2, 1)[:, ::2],
    "part_of_a_row": lambda weight: torch.nn.functional.pad(weight, (5, 8))[:, 5:-8],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("k", [5, 16, 17, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_layout_and_width(layout: Callable[[Tensor], Tensor], k: int, dtype: str, seed: int) -> None:
    call = _call(seed, (70, k), 2, dtype)
    call = call.replace(weight=layout(call.weight))
    run(call, "cpu")
    assert gained(lambda: run(call, "cpu")) == (2, 0)
    for row in range(0, 70, 9):
        call.weight.data[row, (row * 5) % k] = 7.0
        within_budget(call, "cpu")
        assert gained(lambda: run(call, "cpu"))[1] == 0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "item": lambda weight: weight.__setitem__((500, 77), 30.0),
    "row": lambda weight: weight[40].fill_(1.0),
    "numpy": lambda weight: weight.numpy().__setitem__((3, 250), 30.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_any_write_to_a_weight_made_under_inference_mode(write: Callable[[Tensor], object], seed: int) -> None:
    """No counter tells of any change of such a tensor, so all of it is read again in every call."""
    call = _call(seed, FAR, 1)
    with torch.inference_mode():
        weight = call.weight * 2
        for _ in range(3):
            y = lora_linear(call.x, weight, call.lora_A, call.lora_B, impl="cpu", **call.optional)
            exact = lora_linear(call.x, weight, call.lora_A, call.lora_B, impl="eager", **call.optional)
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-3)
            write(weight)
            weight.mul_(0.5)


def test_dlpack_and_numpy_views(seed: int) -> None:
    call = _call(seed, NEAR, 3)
    run(call, "cpu")
    torch.from_dlpack(call.weight.detach())[200] = 1.0
    within_budget(call, "cpu")
    call.weight.numpy()[300] = -1.0
    within_budget(call, "cpu")
