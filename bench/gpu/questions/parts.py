"""The parts of one frozen product, and the ways to put them together, each beside the bare library product.

- `plain TILE`: our GEMM by itself: the tail's kernel with no rank to add
- `specialised TILE`: the same with a warp that only loads; see `specialised`
- `shrink`: x·Aᵀ by our kernels
- `shrink, library`: x·Aᵀ by the library
- `tail TILE`: the shrink, then the GEMM with its tail, whose launches overlap
- `tail TILE, without overlap`: the same, one launch after the other
- `single TILE`: both in one launch
- `library, S·Bᵀ after`: the library's product, then `addmm_` of S·Bᵀ onto it; S is there
- `library, S·Bᵀ first`: S·Bᵀ, then the library's product onto it; S is there
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases
from bench.data import SCALING
from bench.gpu.device import Cuda, Device
from bench.gpu.layer import copies, normal
from bench.gpu.questions import specialised
from bench.gpu.questions.names import AFTER, FIRST, LIBRARY_SHRINK, PLAIN, SHRINK, SPECIALISED, WITHOUT_OVERLAP
from bench.gpu.verify import poisoned_allocations, sampled_rows
from bench.verify import WrongResultError, check
from peftkernels.backends.triton.common import launch, tiles
from peftkernels.backends.triton.common.arguments import Frozen, LowRank, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.tiles import Tile
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.frozen_product import TailProduct, plan_tail
from peftkernels.backends.triton.linear.routes import BACKWARD, FORWARD, SINGLE, TAIL, Choice, Product
from peftkernels.cli.timing import Effort, Spread, interleave, spread

BARE = "F.linear"
BRIEF, LONG = Effort(0.0, 3, 1.0), Effort(0.3, 7, 2.0)
SMOKE = Effort(0.0, 1, 0.1)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Found:
    """What was measured of a product.

    Attributes:
        bare: seconds of the bare library product, median.
        ratios: every contestant's time over the bare product's in the same round.
        rounds: that count.
    """

    product: Product
    bare: float
    ratios: dict[str, Spread]
    rounds: int


@dataclass
class Failures:
    """wrong: what computed something else; refused: what could not run, by contestant, with the reason."""

    wrong: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class Parts:
    """The contestants of one product, on inputs and weights that rotate."""

    baseline = BARE

    def __init__(self, product: Product, device: Device) -> None:
        self.product, self._device = product, device
        self._dtype: torch.dtype = getattr(torch, product.dtype)
        m, n, k, wanted = product.m, product.n, product.k, 2 * device.cache_bytes
        self._forward = product.direction == FORWARD
        self._width, self._columns = (k, n) if self._forward else (n, k)
        size = self._dtype.itemsize
        self._weights = normal(copies(n * k * size, wanted), (n, k), self._dtype, device, k**-0.5)
        inputs = copies(m * self._width * size, wanted)
        self._inputs = normal(inputs, (m, self._width), self._dtype, device)
        (self._lora_A,) = normal(1, (cases.RANK, k), self._dtype, device, k**-0.5)
        (self._lora_B,) = normal(1, (n, cases.RANK), self._dtype, device, 0.1)
        self._shrinks = [F.linear(x, self._lora_A) for x in self._inputs] if self._forward else []
        self._rows = sampled_rows(m, m * n * k)
        self._nothing = torch.zeros(2, dtype=torch.int32, device=device.place)
        self.contestants: dict[str, Call] = {BARE: self._bare}

    def prepare(self, name: str) -> None:
        """Let whatever came before end."""
        self._device.synchronize()

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` calls from input number `first` on."""
        call = self.contestants[name]
        with torch.no_grad():
            for i in range(first, first + repeats):
                call(i)

    def add(self, name: str, failures: Failures) -> None:
        """Verify a contestant and let it take part; one that cannot is noted in `failures`."""
        try:
            call = self._build(name)
            with torch.no_grad(), poisoned_allocations():
                found = call(0)
                self._device.synchronize()
            self._check(name, found)
        except WrongResultError as error:
            failures.wrong.append(str(error))
        except Exception as error:
            # Whatever a kernel that this GPU or this compiler has no room for raises: said, and left out.
            failures.refused.setdefault(name, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            self.contestants[name] = call

    def keep(self, names: list[str]) -> None:
        """Let these contestants go on beside the bare product."""
        self.contestants = {name: self.contestants[name] for name in (BARE, *names)}

    def measure(self, effort: Effort, turn_seconds: float) -> Found:
        """All contestants against the bare product."""
        samples = interleave(self, effort, stopwatch=self._device.elapsed, turn_seconds=turn_seconds)
        ratios = {name: spread(samples.ratios(name, BARE)) for name in self.contestants if name != BARE}
        return Found(self.product, spread(samples.times(BARE)).median, ratios, len(samples.rounds))

    def _operands(self, i: int) -> tuple[Tensor, Tensor]:
        return self._inputs[i % len(self._inputs)], self._weights[i % len(self._weights)]

    def _bare(self, i: int) -> Tensor:
        operand, weight = self._operands(i)
        return F.linear(operand, weight) if self._forward else torch.mm(operand, weight)

    def _build(self, name: str) -> Call:
        kind, _, tile = name.removesuffix(WITHOUT_OVERLAP).partition(" ")
        if kind == PLAIN:
            return self._plain(tiles.tile(tile))
        if kind == SPECIALISED:
            return self._specialised(tiles.tile(tile))
        if kind in (TAIL, SINGLE):
            return self._fused(Choice(kind, tile), overlap=not name.endswith(WITHOUT_OVERLAP))
        return {
            SHRINK: self._shrink,
            LIBRARY_SHRINK: lambda i: F.linear(self._operands(i)[0], self._lora_A),
            AFTER: self._after,
            FIRST: self._first,
        }[name]

    def _plain(self, tile: Tile) -> Call:
        # Ranks are read on the device: that there are none is no other kernel.
        kinds = Kinds(self._dtype, self._dtype, plan=True)
        m = self.product.m
        sizes = Sizes(m, self.product.n, self.product.k, r=16, width=16)
        product: TailProduct = plan_tail(kinds, self._device.place, tile, sizes, transposed=not self._forward)
        left = self._inputs[0].new_zeros((m, 16))
        right = left.new_zeros((self._columns, 16) if self._forward else (16, self._columns))
        low_rank = LowRank(left, right, None, self._nothing)

        def call(i: int) -> Tensor:
            operand, weight = self._operands(i)
            out = operand.new_empty((m, self._columns))
            product(Frozen(operand, weight), low_rank, out, 1.0)
            return out

        return call

    def _specialised(self, tile: Tile) -> Call:
        capability = launch.capability(self._device.place)
        reason = specialised.refusal(self._dtype, tile, capability)
        if reason is not None:
            raise RuntimeError(reason)
        return lambda i: specialised.product(tile, *self._operands(i))

    def _fused(self, choice: Choice, overlap: bool) -> Call:
        forward = torch.ops.peftkernels.lora_linear_fwd.triton
        rest = (None, None, None, None, None, SCALING, None, 0.0, None, False)

        def call(i: int) -> Tensor:
            with routes.forced(choice), nullcontext() if overlap else launch.without_overlap():
                y: Tensor = forward(*self._operands(i), self._lora_A, self._lora_B, *rest)[0]
            return y

        return call

    def _shrink(self, i: int) -> Tensor:
        shrink: Tensor = torch.ops.peftkernels.lora_shrink.triton(self._operands(i)[0], [self._lora_A])
        return shrink

    def _after(self, i: int) -> Tensor:
        operand, weight = self._operands(i)
        return F.linear(operand, weight).addmm_(self._shrinks[i % len(self._shrinks)], self._lora_B.T, alpha=SCALING)

    def _first(self, i: int) -> Tensor:
        operand, weight = self._operands(i)
        # The factors' product needs its scaling too: alpha of an `addmm` onto nothing.
        share = self._shrinks[i % len(self._shrinks)]
        out = torch.addmm(share.new_empty(()), share, self._lora_B.T, beta=0, alpha=SCALING)
        return out.addmm_(operand, weight.T)

    def _check(self, name: str, found: Tensor) -> None:
        """By the rule of `bench/verify.py`, in float64, in a sample of the rows of large products."""
        p = self.product
        direction = cases.FORWARD if self._forward else cases.BACKWARD
        case = cases.Case(direction=direction, K=p.k, N=p.n, M=p.m, dtype=_DTYPES[self._dtype], bias=False)
        if not found.isfinite().all():
            raise WrongResultError(f"{case.id}: {name}: it holds elements that are not finite or written")
        operands = (*self._operands(0), self._lora_A, self._lora_B)
        exact = self._formula(name, operands[0][self._rows].double(), *(each.double() for each in operands[1:]))
        check(case, name, {"y": found[self._rows]}, {"y": self._formula(name, *operands)[self._rows]}, {"y": exact})

    def _formula(self, name: str, operand: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        if name in (SHRINK, LIBRARY_SHRINK):
            return F.linear(operand, lora_A)
        frozen = F.linear(operand, weight) if self._forward else operand @ weight
        if name.startswith((PLAIN, SPECIALISED)):
            return frozen
        return frozen + F.linear(F.linear(operand, lora_A), lora_B) * SCALING


def products(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], dtype: str) -> list[Product]:
    """Both directions of every (K, N) at every number of rows."""
    return [Product(direction, dtype, m, n, k) for m in tokens for k, n in shapes for direction in (FORWARD, BACKWARD)]


def plain_contestants(product: Product, capability: tuple[int, int]) -> list[str]:
    """Our GEMMs by themselves: every tile that could serve the product."""
    fitting = [
        tile
        for tile in tiles.shipped(product.dtype, capability)
        if routes.refusal(Choice(TAIL, tile.name), product, capability) is None and tile.rows <= 2 * product.m
    ]
    names = [f"{PLAIN} {tile.name}" for tile in fitting]
    if product.direction == FORWARD and capability >= (9, 0):
        names += [f"{SPECIALISED} {tile.name}" for tile in specialised.TILES]
    return names


def composed_contestants(tile: str) -> list[str]:
    """The forward pass put together from its parts, with the GEMM on this tile."""
    fused = [f"{TAIL} {tile}", f"{TAIL} {tile}{WITHOUT_OVERLAP}", f"{SINGLE} {tile}"]
    return [SHRINK, LIBRARY_SHRINK, *fused, AFTER, FIRST]


def measure_product(
    product: Product, device: Device, failures: Failures, efforts: tuple[Effort, Effort], turn_seconds: float
) -> Found:
    """The GEMMs by themselves, then with the best of them, and the best specialised one, everything else."""
    bench = Parts(product, device)
    capability = torch.cuda.get_device_capability(device.place) if isinstance(device, Cuda) else (9, 0)
    brief, long = efforts
    for name in plain_contestants(product, capability):
        bench.add(name, failures)
    ratios = bench.measure(brief, turn_seconds).ratios
    best = [
        min((name for name in ratios if name.startswith(kind)), key=lambda name: ratios[name].median, default=None)
        for kind in (PLAIN, SPECIALISED)
    ]
    kept = [name for name in best if name is not None]
    bench.keep(kept)
    plain = best[0]
    if plain is not None and product.direction == FORWARD:
        for name in composed_contestants(plain.partition(" ")[2]):
            bench.add(name, failures)
    return bench.measure(long, turn_seconds)
