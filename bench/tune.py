"""Calibrates the Triton backend's dispatch: times every candidate for every product and writes the GPU's table.

    python -m bench.tune --out DIR [--limit SECONDS] [--dtype bfloat16]

A product is the frozen one of a layer with its low-rank tail, forward or backward. Each candidate is verified, then
timed beside the bare library product in interleaved rounds: all of them briefly, the best again for longer. Products of
few rows are timed as replays of a CUDA graph, so that the host's time does not hide the device's.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, results, verify
from bench.data import SCALING
from bench.gpu.cases import SHAPES
from bench.gpu.device import Cuda, Device, DeviceError, answers, find
from bench.gpu.layer import copies, normal
from bench.gpu.verify import poisoned_allocations, sampled_rows
from peftkernels.backends import registry
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import BACKWARD, FORWARD, LIBRARY, Choice, Entry, Product, Table
from peftkernels.cli.machine import versions
from peftkernels.cli.timing import Effort, interleave, spread
from peftkernels.ops.call import Shrink

BARE = "bare"
# Training's rows first, then decoding's, then what lies between and beyond: time may run out.
TOKENS = (2048, 8192, 512, 1, 16, 128, 16384)
SMOKE_SHAPES, SMOKE_TOKENS = ((64, 48),), (33, 1)
# Rows up to which products are replayed from a graph.
GRAPH_ROWS, MOST_RECORDED = 512, 16
KEPT = 4
# What a candidate has to save to be preferred to the library.
MARGIN = 0.005
DTYPE = ["bfloat16"]
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Pace:
    """Efforts for all candidates and for the best of them, and seconds of a turn of the bare product in each."""

    brief: Effort
    long: Effort
    brief_turn: float
    long_turn: float


USUAL = Pace(Effort(0.0, 3, 1.0), Effort(0.25, 5, 1.5), 2e-3, 4e-3)
SMOKE = Pace(Effort(0.0, 1, 0.1), Effort(0.0, 1, 0.1), 1e-4, 1e-4)


class ProductBench:
    """The bare product and its candidates, by name, on inputs and weights that rotate."""

    baseline = BARE

    def __init__(self, product: Product, device: Device, impl: str) -> None:
        self.product, self._device = product, device
        dtype: torch.dtype = getattr(torch, product.dtype)
        m, n, k, wanted = product.m, product.n, product.k, 2 * device.cache_bytes
        self._forward = product.direction == FORWARD
        width = k if self._forward else n
        self._weights = normal(copies(n * k * dtype.itemsize, wanted), (n, k), dtype, device, k**-0.5)
        self._inputs = normal(copies(m * width * dtype.itemsize, wanted), (m, width), dtype, device)
        (self._lora_A,) = normal(1, (cases.RANK, k), dtype, device, k**-0.5)
        (self._lora_B,) = normal(1, (n, cases.RANK), dtype, device, 0.1)
        self._operators = [
            getattr(operator, impl)
            for operator in (torch.ops.peftkernels.lora_linear_fwd, torch.ops.peftkernels.lora_linear_bwd)
        ]
        self._replays: dict[str, Callable[[], object]] = {}
        self._rows = sampled_rows(m, m * n * k)
        self.contestants: dict[str, Choice | None] = {BARE: None}

    @property
    def recorded(self) -> bool:
        """True where calls are replayed from a graph."""
        return self.product.m <= GRAPH_ROWS

    def add(self, choice: Choice) -> None:
        """Verify a candidate and let it take part.

        Raises `verify.WrongResultError`, or whatever a candidate raises that cannot run.
        """
        with poisoned_allocations(), routes.forced(choice):
            found = self._call(0)
        self._check(str(choice), found)
        self.contestants[str(choice)] = choice

    def keep(self, names: Sequence[str]) -> None:
        """Let only these candidates, and the bare product, go on."""
        self.contestants = {name: self.contestants[name] for name in (BARE, *names)}
        self._replays = {name: replay for name, replay in self._replays.items() if name in self.contestants}

    def record(self) -> None:
        """Capture everyone's calls where the product is one of few rows."""
        for name in self.contestants:
            calls = max(len(self._weights), min(len(self._inputs), MOST_RECORDED))
            if self.recorded and name not in self._replays:
                self._replays[name] = self._device.capture(functools.partial(self._calls, name, 0, calls))

    def prepare(self, name: str) -> None:
        """Let whatever came before end."""
        self._device.synchronize()

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` calls from input number `first` on, or replays where calls are recorded."""
        replay = self._replays.get(name)
        if replay is None:
            self._calls(name, first, repeats)
            return
        for _ in range(repeats):
            replay()

    def ratios(self, effort: Effort, turn_seconds: float) -> dict[str, float]:
        """Every candidate's median time over the bare product's."""
        self.record()
        samples = interleave(self, effort, stopwatch=self._device.elapsed, turn_seconds=turn_seconds)
        return {name: spread(samples.ratios(name, BARE)).median for name in self.contestants if name != BARE}

    def _calls(self, name: str, first: int, repeats: int) -> None:
        choice = self.contestants[name]
        call = self._bare if choice is None else self._call
        with torch.no_grad(), routes.forced(choice):
            for i in range(first, first + repeats):
                call(i)

    def _bare(self, i: int) -> Tensor:
        operand, weight = self._inputs[i % len(self._inputs)], self._weights[i % len(self._weights)]
        return F.linear(operand, weight) if self._forward else torch.mm(operand, weight)

    def _call(self, i: int) -> Tensor:
        operand, weight = self._inputs[i % len(self._inputs)], self._weights[i % len(self._weights)]
        forward, backward = self._operators
        shared = (None, None, None, None, SCALING, None, 0.0, None)
        if self._forward:
            y: Tensor = forward(operand, weight, self._lora_A, self._lora_B, None, *shared, False)[0]
            return y
        needs = [True, False, False, False, False, False]
        grad_x: Tensor = backward(operand, None, weight, self._lora_A, self._lora_B, None, None, *shared, needs)[0]
        return grad_x

    def _check(self, name: str, found: Tensor) -> None:
        """By the rule of `bench/verify.py`, in float64, in a sample of the rows of large products."""
        p = self.product
        what, direction = ("y", cases.FORWARD) if self._forward else ("∂x", cases.BACKWARD)
        case = cases.Case(direction=direction, K=p.k, N=p.n, M=p.m, dtype=_DTYPES[p.dtype], bias=False)
        if not found.isfinite().all():
            raise verify.WrongResultError(f"{case.id}: {name}: {what} holds elements that are not finite or written")
        plain, exact = self._right
        verify.check(case, name, {what: found[self._rows]}, {what: plain}, {what: exact})

    @functools.cached_property
    def _right(self) -> tuple[Tensor, Tensor]:
        """In plain PyTorch, and exactly, in the rows that are compared."""
        operands = (self._inputs[0], self._weights[0], self._lora_A, self._lora_B)
        operand = operands[0][self._rows].double()
        return self._formula(*operands)[self._rows], self._formula(operand, *(each.double() for each in operands[1:]))

    def _formula(self, operand: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        if self._forward:
            return F.linear(operand, weight) + F.linear(F.linear(operand, lora_A), lora_B) * SCALING
        return operand @ weight + (operand @ lora_B) @ lora_A * SCALING


@dataclass
class Tuned:
    """What a run found.

    Attributes:
        wrong: what computed something else, or broke after it had computed the right thing.
        broken: candidates that could not run at all, by name, with the reason.
        left_out: products that time was too short for.
    """

    entries: list[Entry] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    left_out: list[Product] = field(default_factory=list)


def products(smoke: bool, dtypes: Sequence[str]) -> list[Product]:
    """What is calibrated, in order of weight."""
    tokens, shapes = (SMOKE_TOKENS, SMOKE_SHAPES) if smoke else (TOKENS, SHAPES)
    return [
        Product(direction, dtype, m, n, k)
        for dtype in dtypes
        for m in tokens
        for k, n in shapes
        for direction in (FORWARD, BACKWARD)
    ]


def best(ratios: dict[str, float]) -> str:
    """The fastest candidate; the library's, where it is there and nobody beats it by MARGIN."""
    fastest = min(ratios, key=ratios.__getitem__)
    if LIBRARY in ratios and ratios[fastest] > ratios[LIBRARY] * (1 - MARGIN):
        return LIBRARY
    return fastest


def tune(
    wanted: Sequence[Product],
    capability: tuple[int, int],
    make: Callable[[Product], ProductBench],
    limit: float | None,
    say: Callable[[str], None],
    *,
    pace: Pace = USUAL,
    alive: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """Time the candidates of `wanted`, product by product, until all are done or `limit` seconds have passed.

    `alive` says whether the device still computes after something broke.
    """
    found, began = Tuned(), clock()
    taken: list[float] = []
    for number, product in enumerate(wanted):
        started = clock()
        # The first products compile kernels and take long: the shortest of the last ones is what to expect.
        if limit is not None and started - began + min(taken[-3:], default=0.0) > limit:
            found.left_out = list(wanted[number:])
            say(f"time ran out: {len(found.left_out)} of {len(wanted)} products are left to their nearest neighbours")
            break
        try:
            entry = tune_product(product, capability, make, found, say, pace)
        except Exception as error:
            entry = None
            found.wrong.append(f"{name_of(product)}: {type(error).__name__}: {error}")
            say(f"FAILED: {found.wrong[-1]}")
            if not alive():
                say("the device no longer answers")
                break
        taken.append(clock() - started)
        if entry is not None:
            found.entries.append(entry)
            chosen = str(entry.choice)
            say(
                f"[{number + 1}/{len(wanted)}] {name_of(product)}: {chosen} {entry.ratios[chosen]:.3f}"
                + (f", library {entry.ratios[LIBRARY]:.3f}" if LIBRARY in entry.ratios else "")
            )
    return found


def tune_product(
    product: Product,
    capability: tuple[int, int],
    make: Callable[[Product], ProductBench],
    found: Tuned,
    say: Callable[[str], None],
    pace: Pace = USUAL,
) -> Entry | None:
    """The entry of one product, None where no candidate is right; failures are added to `found`."""
    bench = make(product)
    for choice in routes.candidates(product, capability):
        try:
            bench.add(choice)
        except verify.WrongResultError as error:
            found.wrong.append(str(error))
            say(f"WRONG: {error}")
        except Exception as error:
            # A kernel that this GPU, or this compiler, has no room for: said, and not chosen.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if str(choice) not in found.broken:
                say(f"cannot run: {choice} on {name_of(product)}: {reason}")
            found.broken.setdefault(str(choice), reason)
    if len(bench.contestants) == 1:
        return None
    ratios = bench.ratios(pace.brief, pace.brief_turn)
    kept = sorted(ratios, key=ratios.__getitem__)[:KEPT]
    bench.keep(list(dict.fromkeys([*kept, *(name for name in (LIBRARY,) if name in ratios)])))
    ratios.update(bench.ratios(pace.long, pace.long_turn))
    # A brief figure must not win against a long one.
    chosen = best({name: ratios[name] for name in bench.contestants if name != BARE})
    rounded = {name: round(ratio, 4) for name, ratio in sorted(ratios.items(), key=lambda item: item[1])}
    winner = bench.contestants[chosen]
    assert winner is not None
    return Entry(product, winner, rounded)


def name_of(product: Product) -> str:
    """In one line, for people."""
    return f"{product.direction} M={product.m} N={product.n} K={product.k} {product.dtype}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 done, 1 a candidate was wrong (the table is without it), 2 no GPU or nothing to write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Calibrate the Triton backend's dispatch."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table, <gpu>.json")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds (default: as long as it takes)")
    parser.add_argument(
        "--dtype", action="append", choices=tuple(_DTYPES), help="of the products; repeatable (default: bfloat16)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --smoke alone")
    parser.add_argument("--smoke", action="store_true", help="tiny products; on the CPU all run on the eager backend")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.smoke:
        parser.error("--device: cpu is for --smoke alone, a table belongs to a GPU")
    try:
        device = find(options.device)
    except DeviceError as error:
        print(f"bench.tune: error: {error}", file=sys.stderr)
        return 2
    impl, capability = "triton", (9, 0)
    if isinstance(device, Cuda):
        capability = torch.cuda.get_device_capability(device.place)
        empty = torch.empty(0, 0, dtype=torch.bfloat16, device=device.place)
        refused = registry.refusal(impl, Shrink(empty, ()))
        if refused is not None:
            print(f"bench.tune: error: the Triton backend cannot run here: {refused}", file=sys.stderr)
            return 2
    else:
        empty = torch.empty(0, 0, dtype=getattr(torch, (options.dtype or DTYPE)[0]))
        refused = registry.refusal(impl, Shrink(empty, ()))
        if refused is not None:
            print(f"every candidate runs on the eager backend: {refused}")
            impl = "eager"
    wanted = products(options.smoke, options.dtype or DTYPE)
    found = tune(
        wanted,
        capability,
        lambda product: ProductBench(product, device, impl),
        options.limit,
        lambda text: print(text, flush=True),
        pace=SMOKE if options.smoke else USUAL,
        alive=functools.partial(answers, device),
    )
    if not found.entries:
        print("bench.tune: error: no product was measured, no table was written", file=sys.stderr)
        return 1 if found.wrong else 2
    known = versions(["torch", "triton"])
    measured = {"date": date.today().isoformat(), "commit": results.commit()}
    measured.update({name: known[name] or "" for name in ("torch", "triton")})
    path = options.out / routes.file_name(device.name)
    options.out.mkdir(parents=True, exist_ok=True)
    routes.write_table(path, Table(device.name, measured, tuple(found.entries)))
    routes.read_table(path)
    print(f"written: {path} ({len(found.entries)} products, {len(found.broken)} candidates could not run)")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
