"""What a rank costs: microseconds, measured on this machine, and bytes."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkernels._reading import check_number, check_object
from peftkernels.allocation.files import read_kind, write_json
from peftkernels.allocation.layers.gated import GatedLayer, find_gated_layers
from peftkernels.nn import AdaLoRALinear
from peftkernels.ops.rank_plan import RankState

# A layer's own rank may be so low that what one rank adds is lost in the clock's noise.
ACTIVE_RANKS = (16, 64)
# One turn lasts at least so long, so that the clock's steps do not count.
TURN_SECONDS = 2e-3
ATTEMPTS = 3
_KIND = "peftkernels costs"


@dataclass(frozen=True)
class Shape:
    """All that the cost of a rank depends on: a layer W (N, K), and rows of x on a device with so many threads."""

    n: int
    k: int
    weight: torch.dtype
    factors: torch.dtype
    rows: int
    device: str
    threads: int

    @property
    def parameters(self) -> int:
        """Numbers that one rank consists of: N + K + 1."""
        return self.n + self.k + 1


_measured: dict[Shape, float] = {}


def measured_costs(
    model: nn.Module | Mapping[str, Any], *, rows: int = 512, repeats: int = 21, fresh: bool = False
) -> dict[str, float]:
    """Measure the microseconds that one more ACTIVE rank adds to forward and backward of each gated layer.

    For each different shape (N, K) a layer of rank 64 is timed with all ranks ACTIVE and with 16 (the others DEAD), in
    turns that alternate; the cost is the median over `repeats` rounds of the difference within a round, over 48. What
    was measured for a shape, rows, device and number of threads is kept for the process; `fresh` measures again.

    Where noise hides the difference after three attempts of growing length, the shape takes the cost by parameter of
    the others, with a warning. Give the same costs to a run that is resumed: `save_costs`, `load_costs`.

    Args:
        model: A module with AdaLoRALinear layers, or a mapping of names to such layers.
        rows: Rows of x, the tokens of a batch.
        repeats: Rounds.
        fresh: True measures shapes again that were measured before.

    Returns:
        The costs by layer name.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
        RuntimeError: Where noise hides the cost of every shape.
    """
    for name, value in (("rows", rows), ("repeats", repeats)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    layers = find_gated_layers(model)
    shapes = {name: _shape(layer, rows) for name, layer in layers.items()}
    unknown = [shape for shape in dict.fromkeys(shapes.values()) if fresh or shape not in _measured]
    costs = {shape: _measure(shape, repeats) for shape in unknown}
    _measured.update(guarded(costs, {shape: _measured[shape] for shape in set(shapes.values()) - set(unknown)}))
    return {name: _measured[shape] for name, shape in shapes.items()}


def byte_costs(model: nn.Module | Mapping[str, Any], *, copies: int = 1) -> dict[str, float]:
    """Return the bytes of one rank of each gated layer: copies · (N + K + 1) · bytes of a factor's number.

    Masks alone free no memory: shapes stay as they are while ranks are chosen.

    Args:
        model: A module with AdaLoRALinear layers, or a mapping of names to such layers.
        copies: 1 for the adapter that is saved and served; 4 where it is fine-tuned on with Adam at the ranks that are
            kept (numbers, gradients and two moments).

    Returns:
        The costs by layer name.

    Raises:
        ValueError: Naming the argument.
    """
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise ValueError(f"copies: found {copies!r}, expected an int of at least 1")
    return {
        name: float(copies * (layer.lora_B.shape[0] + layer.lora_A.shape[1] + 1) * layer.lora_A.element_size())
        for name, layer in find_gated_layers(model).items()
    }


def save_costs(costs: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Write costs by layer to a JSON file, all of it or nothing."""
    write_json(path, {"kind": _KIND, "costs": dict(costs)})


def load_costs(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the costs that `save_costs` wrote, to the bit.

    Raises:
        ValueError: For another file.
    """
    where = f"{os.fspath(path)}: costs"
    costs = check_object(read_kind(path, _KIND).get("costs"), where)
    for name, cost in costs.items():
        if check_number(cost, f"{where}[{name!r}]") <= 0:
            raise ValueError(f"{where}[{name!r}]: found {cost}, expected a number above 0")
    return {name: float(cost) for name, cost in costs.items()}


def cost_per_rank(
    run: Callable[[int], None],
    *,
    low: int,
    high: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds that a rank adds: median over rounds of (time of run(high) - time of run(low)) / (high - low).

    A turn repeats `run` for a few milliseconds, the two take turns, and which comes first changes from round to round,
    so that a machine that becomes slower or faster cancels out.

    Args:
        run: Called with a number of ranks: runs once with so many ACTIVE.
        low: The lower number of ranks.
        high: The higher one.
        repeats: Rounds.
        clock: Gives seconds.
    """

    def turn(active: int, calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            run(active)
        return (clock() - begin) / calls

    turn(high, 1)
    turn(low, 1)
    calls = max(1, round(TURN_SECONDS / max(turn(low, 1), 1e-9)))
    differences = []
    for number in range(repeats):
        first, second = (low, high) if number % 2 else (high, low)
        times = {first: turn(first, calls), second: turn(second, calls)}
        differences.append(times[high] - times[low])
    return statistics.median(differences) / (high - low)


def guarded(costs: Mapping[Shape, float], known: Mapping[Shape, float]) -> dict[Shape, float]:
    """Replace costs that are not above 0, which noise hides, by the median cost by parameter of the other shapes.

    Args:
        costs: What was measured now.
        known: What was measured before, for other shapes.

    Returns:
        A cost for each shape in `costs`.

    Raises:
        RuntimeError: Where no cost is above 0.
    """
    good = {shape: cost for shape, cost in {**known, **costs}.items() if cost > 0}
    bad = [shape for shape in costs if shape not in good]
    if not bad:
        return dict(costs)
    shown = ", ".join(f"({shape.n}, {shape.k})" for shape in bad)
    if not good:
        raise RuntimeError(
            f"costs: found no time that a rank of {shown} adds above the noise of this machine; measure while it is "
            "idle, with more rows or repeats, or budget in parameters"
        )
    by_parameter = statistics.median(cost / shape.parameters for shape, cost in good.items())
    warnings.warn(
        f"what a rank of {shown} adds is lost in noise; its cost is taken from its number of parameters", stacklevel=3
    )
    return {shape: good.get(shape, by_parameter * shape.parameters) for shape in costs}


def _shape(layer: GatedLayer, rows: int) -> Shape:
    base: Any = getattr(layer, "base_layer", None)
    weight = layer.lora_A.dtype if base is None else base.weight.dtype
    n, k = layer.lora_B.shape[0], layer.lora_A.shape[1]
    return Shape(n, k, weight, layer.lora_A.dtype, rows, str(layer.lora_A.device), torch.get_num_threads())


def _measure(shape: Shape, repeats: int) -> float:
    """Microseconds; not above 0 where noise hides them in all attempts."""
    run, seconds = _runner(shape), 0.0
    low, high = ACTIVE_RANKS
    for attempt in range(ATTEMPTS):
        seconds = cost_per_rank(run, low=low, high=high, repeats=repeats * 2**attempt)
        if seconds > 0:
            break
    return seconds * 1e6


def _runner(shape: Shape) -> Callable[[int], None]:
    device = torch.device(shape.device)
    # Drawn from a generator of its own: measuring does not change the run that follows.
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = shape.weight) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    linear = nn.Linear(shape.k, shape.n, bias=False, device="meta", dtype=shape.weight).to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        layer = AdaLoRALinear.from_linear(linear, ACTIVE_RANKS[1])
    with torch.no_grad():
        linear.weight.copy_(draw(shape.n, shape.k))
        layer.lora_E.fill_(0.5)
    for factor in ("lora_A", "lora_B", "lora_E"):
        getattr(layer, factor).data = getattr(layer, factor).data.to(shape.factors)
    x = draw(shape.rows, shape.k).requires_grad_()
    gradient = draw(shape.rows, shape.n)
    states = {
        active: torch.tensor(
            [int(RankState.ACTIVE)] * active + [int(RankState.DEAD)] * (ACTIVE_RANKS[1] - active), dtype=torch.uint8
        ).to(device)
        for active in ACTIVE_RANKS
    }
    inputs = (x, layer.lora_A, layer.lora_B, layer.lora_E)
    current = 0

    def run(active: int) -> None:
        nonlocal current
        if active != current:
            layer.rank_plan.update_(states[active])
            current = active
        torch.autograd.grad(layer(x), inputs, gradient)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return run
