"""`weights_changed` forgets what is kept of a weight, and only that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import make_call, run
from support.checks import within_budget
from support.packs import count, fresh_cache, gained
from torch import Tensor, nn

import peftkernels
from peftkernels import lora_linear, weights_changed
from peftkernels.functional import frozen_weights

N, K = 70, 90


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _silently(weight: Tensor, row: int, column: int, value: float) -> None:
    """One element, in a way that moves no version counter."""
    weight.data[row, column] = value


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_element_written_through_data(dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(6,), n=N, k=K, r=4, dtype=dtype)
    run(call, "cpu")
    for row in range(0, N, 7):
        _silently(call.weight, row, (row * 11) % K, 30.0)
        weights_changed(call.weight)
        within_budget(call, "cpu")


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda weight: nn.Parameter(weight, requires_grad=False),
    "data": lambda weight: weight.data,
    "transposed": lambda weight: weight.T,
    "row": lambda weight: weight[3],
    "flat": lambda weight: weight.view(-1),
    "numpy": lambda weight: torch.from_numpy(weight.numpy()),
    "numpy_part": lambda weight: torch.from_numpy(weight.numpy()[-1, -1:]),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_any_tensor_in_the_same_memory_means_the_weight(alias: Callable[[Tensor], Tensor], seed: int) -> None:
    call, other = (make_call(seed + i, leading=(6,), n=N, k=K, r=4) for i in range(2))
    run(call, "cpu")
    run(other, "cpu")
    weights_changed(alias(call.weight))
    assert gained(lambda: run(call, "cpu")) == (0, 2)
    assert gained(lambda: run(other, "cpu")) == (2, 0)


def test_a_module_means_all_that_is_in_it(seed: int) -> None:
    calls = [make_call(seed + i, leading=(6,), n=N, k=K, r=4) for i in range(4)]
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Identity())
    model[0].weight = nn.Parameter(calls[0].weight, requires_grad=False)
    model[1].register_buffer("table", calls[1].weight)
    model[1].plain = calls[2].weight
    for call in calls:
        run(call, "cpu")
    weights_changed(model)
    for call, found in zip(calls, [(0, 2), (0, 2), (0, 2), (2, 0)], strict=True):
        assert gained(lambda call=call: run(call, "cpu")) == found


def test_a_weight_that_was_refused_may_ask_again(seed: int) -> None:
    from peftkernels.backends import cpu

    call = make_call(seed, leading=(6,), n=N, k=K, r=4)
    cpu.set_pack_limit(0)
    run(call, "cpu")
    assert count("refused") == 1
    weights_changed(call.weight)
    assert count("refused") == 0


def test_a_compiled_program_sees_the_change(seed: int) -> None:
    call = make_call(seed, leading=(6,), n=N, k=K, r=4)

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor, weight: Tensor) -> Tensor:
        return lora_linear(x, weight, call.lora_A, call.lora_B, impl="cpu")

    with torch.no_grad():
        compiled(call.x, call.weight)
        _silently(call.weight, 5, 7, 30.0)
        weights_changed(call.weight)
        exact = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl="eager")
        torch.testing.assert_close(compiled(call.x, call.weight), exact, rtol=1e-4, atol=1e-4)


def test_told_within_a_compiled_function(seed: int) -> None:
    call = make_call(seed, leading=(6,), n=N, k=K, r=4)
    before = frozen_weights.generation()

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor, weight: Tensor) -> Tensor:
        y = lora_linear(x, weight, call.lora_A, call.lora_B, impl="cpu")
        weights_changed(weight)
        return y + 1

    with torch.no_grad():
        compiled(call.x, call.weight)
    assert count("entries") == 0
    assert frozen_weights.generation() != before


def test_other_tensors_and_modules_are_taken_without_a_word() -> None:
    empty = torch.zeros(4, 4)
    empty.untyped_storage().resize_(0)
    for nothing_kept in (torch.zeros(3), torch.zeros(2, 2, device="meta"), torch.eye(3).to_sparse(), empty, nn.ReLU()):
        weights_changed(nothing_kept)


@pytest.mark.parametrize("wrong", [None, 3, "weight", [torch.zeros(2)], nn.Linear])
def test_anything_else_is_an_error(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"module_or_tensor: found \w+, expected a torch.nn.Module or a tensor"):
        weights_changed(wrong)  # type: ignore[arg-type]


def test_the_generation_is_another_after_every_call_on_any_thread() -> None:
    seen = [frozen_weights.generation()]

    def change() -> None:
        weights_changed(torch.zeros(2))
        seen.append(frozen_weights.generation())

    for _ in range(5):
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
    assert len(set(seen)) == len(seen)
    assert peftkernels.weights_changed is weights_changed
