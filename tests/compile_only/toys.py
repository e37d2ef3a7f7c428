"""Small kernels with one known fault each, and a sound one, to prove that `compile_only.resources` sees the faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compile_only.resources import Capability


@triton.jit
def _product(
    a,
    b,
    c,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, DEPTH):
        left = tl.load(a + rows[:, None] * k + depth[None, :] + start)
        right = tl.load(b + columns[None, :] * k + depth[:, None] + start)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    tl.store(c + rows[:, None] * COLUMNS + columns[None, :], sums)


@triton.jit
def _mistaken(
    a,
    b,
    c,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.store(c + tl.arange(0, ROWS), tl.load(a + tl.arange(0, COLUMNS)))


@dataclass(frozen=True)
class Toy:
    name: str
    kernel: Any = _product
    shape: tuple[int, int, int] = (64, 64, 64)
    dtype: str = "bf16"
    precision: str = "ieee"
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    meant_for_wgmma: bool = True

    def compile(self, capability: Capability) -> Any:
        constants = dict(zip(("ROWS", "COLUMNS", "DEPTH"), self.shape, strict=True)) | {"PRECISION": self.precision}
        signature = {"a": f"*{self.dtype}", "b": f"*{self.dtype}", "c": "*fp32", "k": "i32"}
        source = ASTSource(
            self.kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={(place,): [["tt.divisibility", 16]] for place in range(len(signature))},
        )
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        return triton.compile(source, target=target, options=self.options)

    def expects_wgmma(self, capability: Capability) -> bool:
        return self.meant_for_wgmma and capability >= (9, 0)


def variants(capability: Capability) -> Iterator[Toy]:
    """Every toy, on every architecture."""
    yield Toy("sound")
    # 128 registers of sums in a thread that may have 64.
    one_warp = {"num_warps": 1, "num_stages": 1, "maxnreg": 64}
    yield Toy("spills", shape=(16, 256, 64), options=one_warp, meant_for_wgmma=False)
    yield Toy("too_much_shared", shape=(128, 128, 64), options={"num_warps": 8, "num_stages": 9})
    # fp32 products in full precision have no matrix instruction.
    yield Toy("no_wgmma", shape=(16, 64, 16), dtype="fp32", options={"num_warps": 1, "num_stages": 1})
    # As many registers of sums as a thread may have: the products wait for each other.
    crowded = {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
    yield Toy("serialised", shape=(128, 128, 64), options=crowded)
    # Loads 32 elements and stores 64.
    yield Toy("mistaken", _mistaken, shape=(64, 32, 16))
