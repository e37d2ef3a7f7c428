"""The process: every kernel launched by the calls that launch it on a GPU. What they compute is nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.driver.stand_in import StandIn, faults

_OPERANDS = ("x", "weight", "lora_A", "lora_B")


def _nothing(device: torch.device, dtype: torch.dtype) -> None:
    """No reason to refuse."""


@contextmanager
def recorded(driver: StandIn) -> Iterator[list[dict[str, Any]]]:
    """In the block the Triton backend serves CPU tensors as it serves a GPU's; yields every launch with its faults."""
    from peftkernels.backends import triton
    from peftkernels.backends.triton import allocation
    from peftkernels.backends.triton.common import launch

    found: list[dict[str, Any]] = []
    original = launch.Variant.__call__

    def call(self: Any, programs: int, *arguments: Any) -> None:
        compiled = self._loaded.get(0) or self._load(0)
        ptx, before = compiled.asm["ptx"], driver.last.launches
        declared = driver.expect(ptx)
        original(self, programs, *arguments)
        wrong = [] if driver.last.launches == before + 1 else ["it never came to the driver"]
        wrong += faults(driver.last, declared, ptx, programs, self.types, arguments, self.aligned, self.overlaps)
        found.append({"kernel": self.function.__name__, "name": self.name, "faults": wrong})

    with (
        mock.patch.object(launch.Variant, "__call__", call),
        mock.patch.object(triton, "refusal", _nothing),
        mock.patch.object(allocation, "refusal", _nothing),
    ):
        yield found


def products() -> None:
    """Forward and backward passes over every route, with everything there is and with nothing beside A and B."""
    from peftkernels.backends.triton.linear.routes import LIBRARY, Choice
    from support.routes import representative

    library, aligned, ragged = Choice(LIBRARY), (272, 208), (269, 203)
    for choice in (library, *representative("bf16").values()):
        product(choice, "bf16", *aligned)
    product(library, "bf16", *ragged)
    # Other dtypes are other types of the same arguments.
    product(representative("fp16")["tail, tma"], "fp16", *aligned, brief=True)
    for name in ("tail, pointer", "single, pointer", "decode, decode"):
        product(representative("fp32")[name], "fp32", *aligned, brief=True)


def product(choice: Any, dtype: str, n: int, k: int, brief: bool = False) -> None:
    """One route and shape: everything, then, unless brief, nothing beside A and B, and S given."""
    from peftkernels import lora_linear, shared_shrink
    from peftkernels.backends.triton.linear import routes
    from support.cases import make_call, run

    shape: dict[str, Any] = {"leading": (13 if choice.route == routes.DECODE else 300,), "n": n, "k": k, "dtype": dtype}
    with routes.forced(choice):
        run(make_call(1, r=21, plan=True, dropout_p=0.2, scaling="tensor", **shape), "triton")
        if brief:
            return
        run(make_call(2, r=16, gate=False, bias=False, **shape), "triton")
        x, weight, lora_A, lora_B = (make_call(3, r=16, **shape).tensors()[name] for name in _OPERANDS)
        shrink, _ = shared_shrink(x, [lora_A, lora_A], impl="triton")
        lora_linear(x, weight, lora_A, lora_B, scaling=2.0, shrink=shrink, impl="triton")


def allocations() -> None:
    """A step of the allocator, by tables of addresses."""
    from peftkernels import RankPlan, RankState
    from peftkernels.backends.triton import allocation
    from support.allocation_calls import BETA1, BETA2, averages_of

    device = torch.device("cpu")
    for layers in ("r12", "odd", "r0_and_r40"):
        drawn = averages_of(layers, device, 1)
        layout, kernels, both = drawn.layout, allocation.kernels(), drawn.copies()
        lora_A, lora_B, gates = (drawn.parameters[kind::3] for kind in range(3))
        plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r in layout.ranks]
        kernels.update_averages(layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2)
        scores = kernels.rank_scores(layout, *both)
        kernels.rank_scores(layout, *(each.clone() for each in both))
        for budget in (layout.total_rank // 2, torch.tensor(3)):
            for exact in (True, False):
                keep, _ = kernels.select(scores, budget, exact)
        kernels.apply(layout, torch.ones_like(keep), gates, plans, int(RankState.PROBE))
        kernels.orthogonality(lora_A, lora_B, 0.5, None, [torch.zeros_like(each) for each in (*lora_A, *lora_B)])


def main() -> None:
    driver = StandIn(Path(sys.argv[1]))
    with recorded(driver) as found:
        products()
        allocations()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
