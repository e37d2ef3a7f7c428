"""Small kernels with one known fault each, and a sound one, to prove that `compile_only.resources` sees the faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_wait

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


@triton.jit
def _follower(
    a,
    b,
    c,
    k,
    READS_EARLY: tl.constexpr,
    WRITES_EARLY: tl.constexpr,
    WAITS: tl.constexpr,
):
    """c = a + b, which the launch before writes, while a is older."""
    places = tl.arange(0, 128)
    older = tl.load(a + places).to(tl.float32)
    if READS_EARLY:
        older += tl.load(b + places).to(tl.float32)
    if WRITES_EARLY:
        tl.store(c + places, older)
    if WAITS:
        gdc_wait()
    tl.store(c + places, older + tl.load(b + places).to(tl.float32))


# Kernels that start before their predecessor has ended: what sets each apart from the sound one.
FOLLOWERS: dict[str, dict[str, bool]] = {
    "follower": {},
    "reads_early": {"READS_EARLY": True},
    "writes_early": {"WRITES_EARLY": True},
    "never_waits": {"WAITS": False},
}


@dataclass(frozen=True)
class Toy:
    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: str = "bf16"
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    meant_for_wgmma: bool = False
    awaited: tuple[str, ...] = ()

    @property
    def types(self) -> dict[str, str]:
        return {"a": f"*{self.dtype}", "b": f"*{self.dtype}", "c": "*fp32", "k": "i32"}

    @property
    def overlaps(self) -> bool:
        return bool(self.options.get("launch_pdl"))

    def compile(self, capability: Capability) -> Any:
        source = ASTSource(
            self.kernel,
            signature={**self.types, **dict.fromkeys(self.constants, "constexpr")},
            constexprs=self.constants,
            attrs={(place,): [["tt.divisibility", 16]] for place in range(len(self.types))},
        )
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        return triton.compile(source, target=target, options=self.options)

    def expects_wgmma(self, capability: Capability) -> bool:
        return self.meant_for_wgmma and capability >= (9, 0)


def _sizes(rows: int = 64, columns: int = 64, depth: int = 64, precision: str = "ieee") -> dict[str, Any]:
    return {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PRECISION": precision}


def variants(capability: Capability) -> Iterator[Toy]:
    """Every toy, on every architecture that has what it uses."""
    yield Toy("sound", _product, _sizes(), meant_for_wgmma=True)
    # 128 registers of sums in a thread that may have 64.
    yield Toy("spills", _product, _sizes(16, 256), options={"num_warps": 1, "num_stages": 1, "maxnreg": 64})
    stages = {"num_warps": 8, "num_stages": 9}
    yield Toy("too_much_shared", _product, _sizes(128, 128), options=stages, meant_for_wgmma=True)
    # fp32 products in full precision have no matrix instruction.
    one_warp = {"num_warps": 1, "num_stages": 1}
    yield Toy("no_wgmma", _product, _sizes(16, 64, 16), dtype="fp32", options=one_warp, meant_for_wgmma=True)
    # As many registers of sums as a thread may have: the products wait for each other.
    crowded = {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
    yield Toy("serialised", _product, _sizes(128, 128), options=crowded, meant_for_wgmma=True)
    # Loads 32 elements and stores 64.
    yield Toy("mistaken", _mistaken, _sizes(64, 32, 16), meant_for_wgmma=True)
    if capability >= (9, 0):
        for name, changes in FOLLOWERS.items():
            constants = {"READS_EARLY": False, "WRITES_EARLY": False, "WAITS": True, **changes}
            yield Toy(name, _follower, constants, options={"num_warps": 4, "launch_pdl": True}, awaited=("b",))
