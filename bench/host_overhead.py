"""``python -m bench.host_overhead``: what Python does between a call on the Triton backend and its launches.

Launches are left out (they are counted instead), so this needs no GPU and says nothing about one: it is the time that
the package's own code takes on the host, beside `F.linear` of one number on the CPU, which is nearly all dispatch. What
a launch costs on top, and what a call costs in all, `bench/run_gpu.sh` measures on a GPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from peftkernels import RankPlan, lora_linear

ROUNDS, CALLS = 15, 400
ROWS, WIDTH, RANK = 16, 64, 16


@contextmanager
def launches_left_out() -> Iterator[list[int]]:
    """Let the Triton backend serve CPU tensors as it serves a GPU's, and skip every launch; yields one number each."""
    from peftkernels.backends import triton
    from peftkernels.backends.triton.common import launch
    from peftkernels.backends.triton.linear import forward_pass, routes, shared_shrink

    made: list[int] = []  # programs of each launch

    def skip(self: Any, programs: int, *arguments: Any) -> None:
        made.append(programs)

    # A plain function: a mock object takes longer to call than what is measured here.
    def serve(device: torch.device, dtype: torch.dtype) -> None:
        return None

    with (
        mock.patch.object(launch.Variant, "__call__", skip),
        mock.patch.object(triton, "refusal", serve),
        mock.patch.object(forward_pass, "INTERPRETED", False),
        mock.patch.object(shared_shrink, "INTERPRETED", False),
    ):
        # Plans that were made before, or are made here, belong to other blocks.
        routes.forget_tables()
        try:
            yield made
        finally:
            routes.forget_tables()


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median over rounds of the time of one call of each, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            samples[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def measure() -> list[tuple[str, int, float, float, float]]:
    """For each route: launches of a forward pass, its microseconds without and with gradients, and above `F.linear`."""
    from peftkernels.backends.triton.linear import routes

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(torch.bfloat16)
    weight = torch.randn(WIDTH, WIDTH, generator=generator).to(torch.bfloat16)
    lora_A = torch.randn(RANK, WIDTH, generator=generator).requires_grad_()
    lora_B = torch.randn(WIDTH, RANK, generator=generator).requires_grad_()
    gate = torch.ones(RANK, requires_grad=True)
    plan = RankPlan.from_mask(torch.arange(RANK) < RANK - 4)
    number = torch.ones(1, 1)

    def ours() -> object:
        return lora_linear(x, weight, lora_A, lora_B, gate=gate, rank_plan=plan, scaling=2.0, impl="triton")

    def without_gradients() -> object:
        with torch.no_grad():
            return ours()

    choices = (
        routes.Choice(routes.DECODE, "decode-16x32x128-4w-4s"),
        routes.Choice(routes.TAIL, "pointer-64x64x64-4w-4s"),
        routes.Choice(routes.TAIL, "tma-128x128x64-8w-4s"),
        routes.Choice(routes.SINGLE, "tma-128x128x64-8w-4s"),
    )
    found = []
    with launches_left_out() as made:
        for choice in choices:
            with routes.forced(choice):
                made.clear()
                without_gradients()
                launches = len(made)
                calls = {"linear": lambda: F.linear(number, number), "call": without_gradients, "trained": ours}
                times = microseconds(calls)
            above = times["call"] - times["linear"]
            found.append((str(choice), launches, times["call"], times["trained"], above))
            made.clear()
    return found


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="Python between a call and its launches, in microseconds; launches left out")
    for name in ("route", "launches", "call", "call with gradients", "call above F.linear"):
        table.add_column(name, justify="left" if name == "route" else "right")
    for route, launches, call, trained, above in measure():
        table.add_row(route, str(launches), f"{call:.1f}", f"{trained:.1f}", f"{above:.1f}")
    Console(width=int(os.environ.get("COLUMNS", 100))).print(table)


if __name__ == "__main__":
    main()
