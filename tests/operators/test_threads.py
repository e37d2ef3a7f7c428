"""How many threads the C++ kernels use, and that they are right among other threads: Python's and OpenMP's."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.cases import Call, Outcome, make_call, run
from support.implementations import skip_unless_served, threads
from support.packs import count, fresh_cache

from peftkernels.backends import cpu

TASKS = Path("/proc/self/task")

# Calls `work(thread)` on every thread of a team of OpenMP, with as many levels of teams within teams as asked for.
TEAM = """
#include <omp.h>

int in_team(int threads, int levels, void (*work)(int)) {
  const int before = omp_get_max_active_levels();
  int team = 0;
  omp_set_max_active_levels(levels);
  #pragma omp parallel num_threads(threads)
  {
    #pragma omp atomic
    team += 1;
    work(omp_get_thread_num());
  }
  omp_set_max_active_levels(before);
  return team;
}
"""


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _assert_same(found: Outcome, expected: Outcome, what: str) -> None:
    for name, value in expected.named().items():
        assert torch.equal(found.named()[name], value), f"{what}: {name} differs"


# In a process of its own: nobody else's threads are counted there.
COUNT_THREADS = """
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from support.cases import make_call, run

TASKS = Path("/proc/self/task")


def run_times():
    times = {}
    for task in TASKS.iterdir():
        try:
            times[task.name] = int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    return times


rows, n, k, seed = map(int, sys.argv[2:])
call = make_call(seed, leading=(rows,), n=n, k=k, r=6)
for wanted in (1, 3, 2, 1):
    torch.set_num_threads(wanted)
    run(call, "cpu")
    time.sleep(0.1)  # until the threads of the setting before have come to rest
    before, ran, calls = run_times(), set(), 0
    deadline = time.monotonic() + 20
    while calls < 10 or (len(ran) < wanted and time.monotonic() < deadline):
        run(call, "cpu")
        calls += 1
        ran = {task for task, took in run_times().items() if took > before.get(task, 0)}
    assert len(ran) == wanted, f"{wanted} threads are set, {len(ran)} ran in {calls} calls"
"""


@pytest.mark.alone
@pytest.mark.skipif(
    not (TASKS / str(os.getpid()) / "schedstat").exists(),
    reason="this system has no /proc/self/task/*/schedstat, which tells how long each thread ran",
)
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 700, 500), (1, 2200, 2000)], ids=["many_rows", "one_row"])
def test_as_many_threads_as_torch_is_told(rows: int, n: int, k: int, seed: int) -> None:
    """Those that run in forward and backward are as many as `torch.set_num_threads` says, whatever it said before."""
    tests = str(Path(__file__).parent.parent)
    arguments = [str(argument) for argument in (tests, rows, n, k, seed)]
    ran = subprocess.run([sys.executable, "-c", COUNT_THREADS, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_many_python_threads_and_a_cache_that_changes(seed: int) -> None:
    """Packs are dropped, refused and cleared while others compute with them."""
    calls = [make_call(seed + i, leading=(rows,), n=130, k=140, r=6) for i, rows in enumerate((1, 3, 40, 150))]
    expected = [run(call, "cpu") for call in calls]
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            for limit in (0, 100_000, "unlimited"):
                cpu.set_pack_limit(limit)
            for mode in ("off", "forward", "both"):
                cpu.set_pack_mode(mode)
            cpu.clear_pack_cache()

    def serve(place: int) -> None:
        for turn in range(40):
            each = (place + turn) % len(calls)
            _assert_same(run(calls[each], "cpu"), expected[each], calls[each].label)

    with ThreadPoolExecutor(5) as pool:
        disturbing = pool.submit(disturb)
        serving = [pool.submit(serve, place) for place in range(4)]
        try:
            for done in serving:
                done.result()
        finally:
            stop.set()
        disturbing.result()
    assert count("refused") == 0


@pytest.fixture(scope="module")
def in_team(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, Callable[[int], None]], int]:
    """`in_team` of the C program above, in the OpenMP library that torch has loaded."""
    skip_unless_served("cpu")
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler to build a parallel region with")
    folder = tmp_path_factory.mktemp("team")
    (folder / "team.c").write_text(TEAM)
    build = [compiler, "-shared", "-fPIC", "-O1", "-fopenmp", "team.c", "-o", "team.so"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{compiler} cannot build a parallel region: {done.stderr.strip().splitlines()[0]}")
    function = ctypes.CDLL(str(folder / "team.so")).in_team
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    return lambda team, levels, work: int(function(team, levels, kind(work)))


@pytest.mark.parametrize("levels", [1, 2], ids=["", "nested_teams"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32_factors"])
def test_inside_another_parallel_region(
    dtype: str, levels: int, in_team: Callable[[int, int, Callable[[int], None]], int], seed: int
) -> None:
    """Every thread of a team calls, some on one weight; with one level a call gets no team of its own."""
    calls: list[Call] = [
        make_call(seed + i, leading=(rows,), n=300, k=260, r=6, plan=True, dropout_p=0.2, dtype=dtype)
        for i, rows in enumerate((300, 1, 140))
    ]
    calls[2] = calls[2].replace(weight=calls[0].weight)
    with threads(2):
        expected = [run(call, "cpu") for call in calls]
        cpu.clear_pack_cache()
        found: dict[int, list[Outcome]] = {}
        failures: list[BaseException] = []

        def work(thread: int) -> None:
            try:
                found[thread] = [run(calls[thread], "cpu") for _ in range(3)]
            except BaseException as failure:  # would end in the C program, which knows none
                failures.append(failure)

        assert in_team(3, levels, work) == 3
    assert not failures, failures[0]
    for thread, outcomes in found.items():
        for outcome in outcomes:
            _assert_same(outcome, expected[thread], f"thread {thread}, {calls[thread].label}")
    assert sorted(found) == [0, 1, 2]
    assert count("weights") == 2


def test_a_weight_changed_by_one_thread_while_another_packs_it(seed: int) -> None:
    """What the first thread packed must not be kept for the weight that a second one meets after the change."""
    call = make_call(seed, leading=(1,), n=3000, k=2048, r=2)

    def pack() -> threading.Thread:
        misses = count("misses")
        thread = threading.Thread(target=lambda: run(call, "cpu", ()))
        thread.start()
        while count("misses") == misses:  # until it packs
            pass
        return thread

    for _ in range(10):
        cpu.clear_pack_cache()
        first = pack()
        call.weight.neg_()
        second = pack()
        for thread in (first, second):
            thread.join()
        found = run(call, "cpu", ()).y
        exact = run(call, "eager", ()).y
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
