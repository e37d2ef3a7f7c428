"""``peftkernels doctor --speed``: `lora_linear` beside the frozen layer, LoRA in plain torch, and HF peft's layer."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkernels import lora_linear
from peftkernels.cli.timing import Effort, interleave, spread

FROZEN, EAGER, PEFT, OURS = "frozen", "eager LoRA", "peft LoRA", "peftkernels"
RANK, SCALING = 16, 2.0
DIRECTIONS = ("forward", "forward + backward")
# For each direction of a shape; all of them together take about twenty seconds, peft's import included.
EFFORT = Effort(2.2, 5, 4.5)


@dataclass(frozen=True)
class Shape:
    """A layer of K inputs and N outputs, called with M rows."""

    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.K:,} -> {self.N:,}, {self.M:,} row{'s' if self.M > 1 else ''}"


# A token of a large model, sentences through a small encoder, a training batch through a usual one.
SHAPES = (Shape(1, 4096, 4096), Shape(128, 384, 384), Shape(512, 768, 3072))


class LayerSpeed:
    """The contestants of one shape and direction, all on the same weight, adapter and x.

    Attributes:
        baseline: the layer without an adapter.
        contestants: functions of x by name, each with what it gets gradients of.
    """

    baseline = FROZEN

    def __init__(self, shape: Shape, *, trains: bool, device: torch.device, with_peft: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = _dtype(device)

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

        self.trains = trains
        self.x = draw(shape.M, shape.K).requires_grad_(trains)
        self.upstream = draw(shape.M, shape.N)
        self.weight = draw(shape.N, shape.K, scale=shape.K**-0.5)
        self.bias = draw(shape.N)
        self.lora_A = draw(RANK, shape.K, scale=shape.K**-0.5).requires_grad_(trains)
        self.lora_B = draw(shape.N, RANK, scale=0.1).requires_grad_(trains)
        factors = (self.lora_A, self.lora_B)
        self.contestants: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]] = {
            FROZEN: (self._frozen, ()),
            EAGER: (self._eager, factors),
            OURS: (self._ours, factors),
        }
        if with_peft:
            layer = self._peft()
            self.contestants[PEFT] = layer, tuple(p for p in layer.parameters() if p.requires_grad)

    def _frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _eager(self, x: Tensor) -> Tensor:
        return self._frozen(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * SCALING

    def _ours(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, bias=self.bias, scaling=SCALING)

    def _peft(self) -> nn.Module:
        """The layer that `peft.get_peft_model` puts in the place of an `nn.Linear`."""
        import peft

        n, k = self.weight.shape
        linear = nn.Linear(k, n, device="meta")
        linear.weight, linear.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (self.weight, self.bias))
        config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"])
        with warnings.catch_warnings():
            # About a model that has no configuration.
            warnings.simplefilter("ignore")
            model: Any = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
        layer: nn.Module = model.base_model.model[0]
        with torch.no_grad():
            for name, factor in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
                getattr(layer, name)["default"].weight.copy_(factor)
        return layer.requires_grad_(False) if not self.trains else layer

    def call(self, name: str) -> list[Tensor]:
        """y, and where it trains the gradients of x, A and B (of the frozen layer: of x)."""
        run, trained = self.contestants[name]
        if not self.trains:
            with torch.no_grad():
                return [run(self.x)]
        y = run(self.x)
        return [y.detach(), *torch.autograd.grad(y, (self.x, *trained), self.upstream)]

    def prepare(self, name: str) -> None:
        """Nothing to do before a turn."""

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` calls."""
        for _ in range(repeats):
            self.call(name)


def measure() -> dict[str, Any]:
    """Time every shape in both directions, on the GPU where there is one; about twenty seconds on two cores.

    Returns:
        JSON values: ``device``, ``dtype``, ``threads``, ``rank``, ``left_out`` (why, by contestant), and ``rows``,
        each with ``M``, ``K``, ``N``, ``direction``, ``milliseconds`` of the frozen layer, ``ratios`` to it by
        contestant (medians over paired rounds), ``rounds`` that count, and ``disturbed``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    with _Progress() as progress:
        progress.show("importing peft")
        without_peft = _why_without_peft()
        for shape in SHAPES:
            for direction in DIRECTIONS:
                progress.show(f"{len(rows) + 1} of {len(SHAPES) * len(DIRECTIONS)}: {shape}, {direction}")
                trains = direction != DIRECTIONS[0]
                bench = LayerSpeed(shape, trains=trains, device=device, with_peft=without_peft is None)
                found = interleave(bench, EFFORT, stopwatch=_synchronised if device.type == "cuda" else None)
                rows.append(
                    {
                        "M": shape.M,
                        "K": shape.K,
                        "N": shape.N,
                        "direction": direction,
                        "milliseconds": 1e3 * statistics.median(found.times(FROZEN)),
                        "ratios": {name: spread(found.ratios(name, FROZEN)).median for name in bench.contestants},
                        "rounds": len(found.rounds),
                        "disturbed": found.disturbed,
                    }
                )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rank": RANK,
        "left_out": {} if without_peft is None else {PEFT: without_peft},
        "rows": rows,
    }


def _dtype(device: torch.device) -> torch.dtype:
    """What layers are mostly trained in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _why_without_peft() -> str | None:
    """Return None where peft can be imported, else the reason."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    try:
        importlib.import_module("peft")
    except Exception as error:  # whatever a broken installation raises
        return f"peft cannot be imported: {type(error).__name__}: {error}"
    return None


def _synchronised(work: Callable[[], None]) -> float:
    """Seconds of a turn on the current GPU, from an idle device to an idle device."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def describe(found: dict[str, Any]) -> str:
    """The table of `measure` for people."""
    names = [name for name in (EAGER, PEFT, OURS) if name not in found["left_out"]]
    labels = {(row["M"], row["K"], row["N"]): str(Shape(row["M"], row["K"], row["N"])) for row in found["rows"]}
    width = max(len(text) for text in (*labels.values(), *(f"  {direction}" for direction in DIRECTIONS)))
    place = f"{found['threads']} threads" if found["device"] == "cpu" else found["device"]
    lines = [
        f"speed: {found['dtype']}, rank {found['rank']}, {place}, medians over rounds that take turns",
        f"  {'':<{width}}  {FROZEN:>11}" + "".join(f"  {name:>11}" for name in names),
    ]
    before = None
    for row in found["rows"]:
        shape = labels[row["M"], row["K"], row["N"]]
        if shape != before:
            lines.append(f"  {shape}")
            before = shape
        ratios = "".join(f"  {row['ratios'][name]:>11.2f}" for name in names)
        mark = "  *" if row["disturbed"] else ""
        lines.append(f"  {'  ' + row['direction']:<{width}}  {row['milliseconds']:>8.3f} ms{ratios}{mark}")
    lines.append("  ratios are to the frozen layer in the same round: 1.00 is what the layer takes without an adapter")
    lines += [f"  {name} is left out: {reason}" for name, reason in found["left_out"].items()]
    if any(row["disturbed"] for row in found["rows"]):
        lines.append("  * other processes used the machine in most rounds: not to be relied on")
    return "\n".join(lines)


class _Progress:
    """One line on standard error that is written over, where that is a terminal."""

    def __init__(self) -> None:
        self._shown = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Put `text` in the line's place."""
        if sys.stderr.isatty():
            line = f"speed {text}" if text else ""
            print(f"\r{line:<{self._shown}}", end="" if text else "\r", file=sys.stderr, flush=True)
            self._shown = len(line)
