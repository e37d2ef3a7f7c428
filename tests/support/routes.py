"""Calls over every way that the Triton kernels may go, small enough for the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftkernels.backends.triton.common import tiles
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import Choice
from support.cases import Call, make_call, run
from support.checks import (
    contains_dead_ranks,
    contains_probe_ranks,
    drops_as_philox_says,
    follows_rank_states,
    masked_equals_sliced,
    propagates,
    repeats,
    within_budget,
)
from support.devices import CPU, device_of

NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def capability() -> tuple[int, int]:
    """The GPU's compute capability; the interpreter can do what 9.0 can."""
    device = device_of("triton")
    return (9, 0) if device == CPU else torch.cuda.get_device_capability(device)


def x_dtype(dtype: str) -> str:
    """The dtype of a product: that of x."""
    return NAMES[dtype.partition("-")[0]]


def choices(dtype: str, m: int, n: int, k: int) -> list[Choice]:
    """Everything that may serve a forward product of this shape."""
    return routes.candidates(routes.Product(routes.FORWARD, x_dtype(dtype), m, n, k), capability())


def representative(dtype: str) -> dict[str, Choice]:
    """The smallest tile of every kind on every route of our own, by names such as "tail, tma"."""
    found: dict[str, Choice] = {}
    every = [choice for m in (16, 1024) for choice in choices(dtype, m, 1024, 1024) if choice.tile]
    for choice in sorted(every, key=lambda choice: _size(tiles.tile(choice.tile))):
        found.setdefault(f"{choice.route}, {tiles.tile(choice.tile).kind}", choice)
    return found


def _size(tile: tiles.Tile) -> int:
    return tile.rows * tile.columns * tile.depth


def shape_for(choice: Choice) -> dict[str, Any]:
    """A call that ends inside tiles in every dimension, with as many tiles as the interpreter has time for."""
    tile = tiles.tile(choice.tile)
    if choice.route == routes.DECODE:
        return {"leading": (13,), "n": 3 * tile.columns - 5, "k": tile.depth + 33}
    # The tensor memory accelerator takes N and K in multiples of 16 alone.
    odd = 16 if tile.kind == tiles.TMA else 5
    return {"leading": (2, tile.rows // 2 + 7), "n": tile.columns + odd, "k": 2 * tile.depth + odd}


def _plan(seed: int, **arguments: Any) -> Call:
    return make_call(seed, r=21, plan=True, **arguments)


def _some_subsets_agree(call: Call) -> None:
    """What is left out where little is asked for changes no bit; `support.checks.subsets_agree` takes every subset."""
    full = run(call, "triton")
    for needs in ((), ("x",), ("lora_A",), ("lora_B",), ("gate",), ("x", "lora_B")):
        some = run(call, "triton", needs).named()
        for name, value in some.items():
            assert torch.equal(value, full.named()[name]), f"{call.label}, needs={needs}, {name}: bits differ"


def _propagates_from_everywhere(call: Call) -> None:
    for name in ("x", "weight", "lora_B", "grad_y"):
        propagates(call, "triton", name)


# Every check that a route could fail by itself, on a call of the given dtype and shape.
ROUTE_CHECKS: dict[str, Callable[[int, str, dict[str, Any]], None]] = {
    "budget": lambda seed, dtype, shape: within_budget(
        make_call(seed, r=5, dtype=dtype, gate=False, **shape), "triton"
    ),
    "budget of all": lambda seed, dtype, shape: within_budget(
        _plan(seed, dtype=dtype, dropout_p=0.3, scaling="tensor", **shape), "triton"
    ),
    "budget of many ranks": lambda seed, dtype, shape: within_budget(
        make_call(seed, r=150, dtype=dtype, bias=False, **shape), "triton"
    ),
    "masked equals sliced": lambda seed, dtype, shape: masked_equals_sliced(
        _plan(seed, dtype=dtype, dropout_p=0.2, **shape), "triton"
    ),
    "rank states": lambda seed, dtype, shape: follows_rank_states(_plan(seed, dtype=dtype, **shape), "triton"),
    "DEAD ranks contained": lambda seed, dtype, shape: contains_dead_ranks(_plan(seed, dtype=dtype, **shape), "triton"),
    "PROBE ranks contained": lambda seed, dtype, shape: contains_probe_ranks(
        _plan(seed, dtype=dtype, **shape), "triton"
    ),
    "NaN propagates": lambda seed, dtype, shape: _propagates_from_everywhere(_plan(seed, dtype=dtype, **shape)),
    "dropout mask": lambda seed, dtype, shape: drops_as_philox_says(
        "triton", seed, 0.4, (min(13, *shape["leading"]),), 80, dtype.partition("-")[0]
    ),
    "determinism": lambda seed, dtype, shape: repeats(_plan(seed, dtype=dtype, dropout_p=0.1, **shape), "triton"),
    "subsets": lambda seed, dtype, shape: _some_subsets_agree(_plan(seed, dtype=dtype, dropout_p=0.2, **shape)),
}
