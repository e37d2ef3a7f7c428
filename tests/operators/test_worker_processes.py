"""The C++ kernels in other processes: children forked while threads are at work, and workers of data loaders."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import Outcome, make_call, run
from support.implementations import threads
from support.packs import count, fresh_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from peftkernels import lora_linear
from peftkernels.nn import LoRALinear

LARGE = {"leading": (300,), "n": 300, "k": 260, "r": 6}
has_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _in_fork(work: Callable[[], object], seconds: float = 60.0) -> None:
    """Run `work` in a forked child, which must return from it in time and without an exception."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(seconds)
    hangs = child.is_alive()
    if hangs:
        child.kill()
        child.join()
    assert not hangs, f"the child did not end within {seconds} s"
    assert child.exitcode == 0, f"the child ended with {child.exitcode}, see its traceback"


def _assert_same(found: Outcome, expected: Outcome) -> None:
    for name, value in expected.named().items():
        assert torch.equal(found.named()[name], value), f"{name} differs"


@has_fork
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_child_forked_from_a_process_that_ran_threads_runs_as_many(dtype: str, seed: int) -> None:
    """Threads do not live on in a child: whoever waits for the parent's waits for ever."""
    call = make_call(seed, dtype=dtype, **LARGE)
    with threads(2):
        expected = run(call, "cpu")

        def work() -> None:
            assert torch.get_num_threads() == 2
            _assert_same(run(call, "cpu"), expected)
            assert count("hits") >= 2, "the parent's packs were not found"
            call.weight.add_(1.0)
            fresh = call.replace(weight=call.weight.clone())
            _assert_same(run(call, "cpu"), run(fresh, "cpu"))
            if sys.platform == "linux":
                assert len(os.listdir("/proc/self/task")) >= 2, "the child computed on one thread"

        _in_fork(work)
        # What the child changed was its own, and the parent has threads again.
        _assert_same(run(call, "cpu"), expected)


@has_fork
def test_other_operators_run_in_the_child_too(seed: int) -> None:
    call, x = make_call(seed, **LARGE), torch.randn(400, 400)
    with threads(2):
        run(call, "cpu")
        expected = torch.exp(x @ x)

        def work() -> None:
            assert torch.equal(torch.exp(x @ x), expected)

        _in_fork(work)


@has_fork
def test_a_child_forked_while_other_threads_use_the_cache(seed: int) -> None:
    call, other = make_call(seed, **LARGE), make_call(seed + 1, n=64, k=64)
    expected = run(call, "cpu")
    stop = threading.Event()

    def pack_again_and_again() -> None:
        # A changed weight is packed in every call, and the cache is locked while the room for it is looked up.
        while not stop.is_set():
            other.weight.data.add_(0.01)
            lora_linear(other.x, other.weight, other.lora_A, other.lora_B, impl="cpu")

    users = [threading.Thread(target=pack_again_and_again) for _ in range(2)]
    for user in users:
        user.start()
    try:
        for _ in range(15):
            _in_fork(lambda: _assert_same(run(call, "cpu"), expected))
    finally:
        stop.set()
        for user in users:
            user.join()


class _Answers(Dataset[tuple[int, bool, Tensor]]):
    """What a layer answers in whatever process asks."""

    def __init__(self, layer: LoRALinear) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, bool, Tensor]:
        x = torch.full((150, self.layer.in_features), float(index + 1), requires_grad=True)
        y = self.layer(x)
        (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return torch.get_num_threads(), count("entries") > 0, torch.cat((y.detach(), grad_x))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    layer = LoRALinear(nn.Linear(90, 90), r=4, lora_alpha=8, impl="cpu")
    nn.init.normal_(layer.lora_B.weight)
    answers = _Answers(layer)
    with threads(2):
        expected = [answers[index][2] for index in range(3)]
        workers = DataLoader(answers, num_workers=1, batch_size=None, multiprocessing_context=method, timeout=60)
        found = list(workers)
    for (thread_count, packs, ours), theirs in zip(found, expected, strict=True):
        assert (thread_count, packs) == (1, True)
        assert torch.equal(ours, theirs)
