"""Odd shapes by every kind of kernel, verified without being timed: what a memory checker is run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench import data
from bench.cases import Case
from bench.gpu.cases import contestants
from bench.gpu.device import Cuda, Device
from bench.gpu.layer import DeviceLayer
from bench.gpu.verify import verify
from bench.verify import WrongResultError
from peftkernels.backends import registry
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import BACKWARD, FORWARD, Choice, Product
from peftkernels.ops.call import Shrink


def check(device: Device, impl: str, cases: Sequence[Case], say: Callable[[str], None]) -> bool:
    """Verify ours and the floor on `cases`; returns whether all are right.

    The Triton backend is verified by the way that its table chooses, and by each other way there is. Cases in a dtype
    that `impl` does not serve on this device are left out, with its reason; there has to be one that is not.
    """
    right, checked = True, 0
    for case in cases:
        empty = torch.empty(0, 0, dtype=data.dtypes(case)[0], device=device.place)
        refused = None if impl == "auto" else registry.refusal(impl, Shrink(empty, ()))
        if refused is not None:
            say(f"left out: {case.id}: {refused}")
            continue
        bench = DeviceLayer(case, device, contestants(case, peft=False), impl)
        ways: list[Choice | None] = [None]
        if registry.choose(impl, bench.adapter.call_of(bench.inputs[0], bench.weight, bench.bias)) == "triton":
            ways += ways_to_go(case, device)
        for way in ways:
            checked += 1
            name = case.id if way is None else f"{case.id} by {way}"
            try:
                with routes.forced(way):
                    verify(bench)
                say(f"right: {name}")
            except WrongResultError as error:
                right = False
                say(f"WRONG: {name}: {error}")
    if not checked:
        say(f"no case was checked: impl={impl!r} serves none of them")
    return right and checked > 0


def ways_to_go(case: Case, device: Device) -> list[Choice]:
    """One choice of each route and kind of tile that serves the case, the library's among them."""
    dtype = str(data.dtypes(case)[0]).removeprefix("torch.")
    # The interpreter stands in for the newest GPU that has everything.
    capability = torch.cuda.get_device_capability(device.place) if isinstance(device, Cuda) else (9, 0)
    found: dict[tuple[str, str], Choice] = {}
    for direction in (FORWARD, BACKWARD) if case.trains else (FORWARD,):
        for choice in routes.candidates(Product(direction, dtype, case.M, case.N, case.K), capability):
            found.setdefault((choice.route, choice.tile.split("-")[0]), choice)
    return list(found.values())
