"""Same inputs, same bits: twice, on any number of threads, beside other threads, and in a worker process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, Call, Outcome, make_call, run
from support.checks import repeats
from support.implementations import interpreted, skip_unless_served, threads

from peftkernels import lora_linear

LARGE: dict[str, dict[str, Any]] = {
    "few_rows": {"leading": (5,), "n": 500, "k": 400},
    "one_block": {"leading": (100,), "n": 300, "k": 200},
    "three_blocks": {"leading": (300,), "n": 130, "k": 140},
    "nine_blocks": {"leading": (1100,), "n": 70, "k": 66},
}
# Interpreted kernels work on 16 and 32 rows, the others on 128: as many blocks, of fewer rows.
INTERPRETED_ROWS = {100: 28, 300: 80}
in_every_size = pytest.mark.parametrize("size", LARGE.values(), ids=LARGE)
in_every_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors", "fp16-fp32_factors"])

WORKER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, sys.argv[1])
from support.cases import make_call, run

class Results(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        call = make_call(index, leading=(150,), n=90, k=80, r=6, plan=True, dropout_p=0.3, dtype=sys.argv[3])
        return [value for value in run(call, sys.argv[2]).named().values()]

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = [Results()[index] for index in range(4)]
    loader = DataLoader(Results(), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=60)
    for index, found in enumerate(loader):
        for ours, theirs in zip(expected[index], found, strict=True):
            assert torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2), (index, ours, theirs)
            if sys.argv[2] == "cpu":
                assert torch.equal(ours, theirs), index
    print("same in", index + 1, "calls")
"""


def _assert_same(found: Outcome, expected: Outcome, what: str) -> None:
    for name, value in expected.named().items():
        assert torch.equal(found.named()[name], value), f"{what}: {name} differs"


@in_every_size
@in_every_dtype
@pytest.mark.parametrize("count", [1, 2], ids=["one_thread", "two_threads"])
def test_a_second_run_gives_the_same_bits(impl: str, size: dict[str, Any], dtype: str, count: int, seed: int) -> None:
    if interpreted(impl) and size is LARGE["nine_blocks"]:
        pytest.skip("interpreted kernels work on 16 and 32 rows: three hundred are many blocks")
    if interpreted(impl):
        (rows,) = size["leading"]
        size = {**size, "leading": (INTERPRETED_ROWS.get(rows, rows),)}
    with threads(count):
        repeats(make_call(seed, plan=True, dropout_p=0.2, dtype=dtype, r=7, **size), impl)


@in_every_size
@in_every_dtype
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_cpu_gives_the_same_bits_on_any_number_of_threads(
    size: dict[str, Any], dtype: str, p: float, seed: int
) -> None:
    skip_unless_served("cpu", dtype)
    call = make_call(seed, plan=True, dropout_p=p, dtype=dtype, r=7, **size)
    alone = run(call, "cpu")
    for count in (2, 3):
        with threads(count):
            _assert_same(run(call, "cpu"), alone, f"{count} threads, {call.label}")


def test_deterministic_algorithms_may_be_demanded(impl: str, seed: int) -> None:
    call = make_call(seed, plan=True, dropout_p=0.2)
    expected = run(call, impl)
    torch.use_deterministic_algorithms(True)
    try:
        _assert_same(run(call, impl), expected, call.label)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_weights", "shared_weight"])
def test_two_python_threads(impl: str, dtype: str, shared: bool, seed: int) -> None:
    """Each thread gets the bits that it gets alone, also where both pack one weight for the first time."""
    skip_unless_served(impl, dtype)
    # One row, less than a block, one row more than a block, and several blocks, which are smaller where interpreted.
    sizes, n, k = ((3, 37, 10, 65, 1, 33), 70, 66) if interpreted(impl) else ((3, 150, 40, 260, 1, 129), 130, 140)
    calls = [
        make_call(seed + i, leading=(rows,), n=n, k=k, r=6, plan=True, dropout_p=0.2, dtype=dtype)
        for i, rows in enumerate(sizes)
    ]
    if shared:
        calls = [call.replace(weight=calls[0].weight) for call in calls]
    expected = [run(call, impl, TRAINABLE) for call in calls]

    def serve(order: list[int]) -> list[tuple[int, Outcome]]:
        torch.set_num_threads(1)
        return [(i, run(calls[i], impl, TRAINABLE)) for i in order * (1 if interpreted(impl) else 5)]

    fresh = calls[0].weight.clone()
    calls = [call.replace(weight=fresh if shared else call.weight.clone()) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(serve, (list(range(6)), list(reversed(range(6))))):
            for i, outcome in results:
                _assert_same(outcome, expected[i], calls[i].label)


def test_weights_may_be_changed_while_another_thread_calls(seed: int) -> None:
    """One thread trains its own weights in place while another one calls: nobody reads a pack of somebody else's."""
    skip_unless_served("cpu")
    calm = make_call(seed, leading=(20,), n=70, k=60, r=4)
    expected = run(calm, "cpu")

    def change(_: int) -> None:
        call: Call = make_call(seed + 1, leading=(20,), n=70, k=60, r=4)
        for _ in range(40):
            call.weight.add_(1.0)
            y = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl="cpu", **call.optional)
            exact = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl="eager", **call.optional)
            torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-2)

    def stay(_: int) -> None:
        for _ in range(40):
            _assert_same(run(calm, "cpu"), expected, calm.label)

    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(change, 0), pool.submit(stay, 0)):
            done.result()


@pytest.mark.parametrize(("name", "dtype"), [("cpu", "fp32"), ("cpu", "bf16"), ("eager", "fp32")])
def test_a_forked_data_loader_worker(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """A worker forked from a process that has already run kernels on two threads."""
    skip_unless_served(name, dtype)
    arguments = [sys.executable, "-c", WORKER, str(request.config.rootpath / "tests"), name, dtype]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "same in 4 calls"
