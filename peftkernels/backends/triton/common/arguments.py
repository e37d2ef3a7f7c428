"""Groups of arguments that many kernels have: a call's values, and in the same order their names and types.

A kernel's arguments are such groups one after the other, which the `launch` beside the kernel unpacks. M, N and K mean
the same in every kernel: x (M, K), y and G (M, N), W (N, K), A (r, K), B (N, r).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import integers, pointer

Types = dict[str, str | None]


class Numbers(NamedTuple):
    """What a call brings as numbers.

    Attributes:
        scaling: The scaling where it is no tensor.
        keep_scale: What dropout multiplies an element by that it keeps, 1/(1-p).
        least: The least word of Philox that keeps an element.
    """

    scaling: float = 1.0
    keep_scale: float = 1.0
    least: int = 0


class AdapterArguments(NamedTuple):
    """One adapter as kernels take it.

    Attributes:
        lora_A: A (r, K), contiguous.
        lora_B: B (N, r), contiguous; None where nothing but x·Aᵀ is taken.
        order: int32 (r,), the plan's compact order of ranks; None without a plan.
        counts: int32 (2,), how many ranks are ACTIVE and how many are live; None without a plan.
        gate: (r,) of any float dtype; None without a gate.
        scaling_tensor: One float on the device; None where the scaling is a number.
        seed: int64, 0-dim, the seed of its dropout; None without dropout.
        numbers: What the call brings as numbers.
    """

    lora_A: Tensor
    lora_B: Tensor | None = None
    order: Tensor | None = None
    counts: Tensor | None = None
    gate: Tensor | None = None
    scaling_tensor: Tensor | None = None
    seed: Tensor | None = None
    numbers: Numbers = Numbers()

    @property
    def ranks(self) -> tuple[Tensor | None, ...]:
        """What its ranks do: order, counts, gate and scaling_tensor."""
        return self[2:6]


class Frozen(NamedTuple):
    """The frozen product's operands.

    Attributes:
        rows: x (M, K) in the forward pass, G (M, N) in the backward pass; each row contiguous.
        weight: W (N, K), contiguous, in the dtype of `rows`.
        bias: (N,) in the dtype of `rows`; None without, and in the backward pass.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None = None


class LowRank(NamedTuple):
    """What a product adds as its last steps, in the dtype of products with a rank; see `products`.

    Attributes:
        left: (M, WIDTH), compact: S or H times scaling·ĝ at ACTIVE places, 0 at others.
        right: ACTIVE columns of B (N, WIDTH), or ACTIVE rows of A (WIDTH, K) in the backward pass.
        bits: What `keep_bits` wrote, where left·right passes dropout; else None.
        counts: int32 (2,), the plan's counts; None without a plan.
    """

    left: Tensor
    right: Tensor
    bits: Tensor | None
    counts: Tensor | None


class Sizes(NamedTuple):
    """Sizes of the operands.

    Attributes:
        m: Rows of x, y and G.
        n: Columns of y and G, rows of W and B.
        k: Columns of x, W and A.
        r: Ranks, ACTIVE or not.
        width: Columns of compact operands: r rounded up to a multiple of 16.
    """

    m: int
    n: int
    k: int
    r: int
    width: int


def rank_types(kinds: Kinds) -> Types:
    """The types of `AdapterArguments.ranks`."""
    return {**plan_types(kinds), "gate_ptr": pointer(kinds.gate), "scaling_ptr": pointer(kinds.scaling)}


def plan_types(kinds: Kinds) -> Types:
    """The types of a plan: the first two of `AdapterArguments.ranks`."""
    return {"order_ptr": "*i32" if kinds.plan else None, "counts_ptr": "*i32" if kinds.plan else None}


def adapter_types(kinds: Kinds, b: bool = True) -> Types:
    """The types of `AdapterArguments` as far as its numbers; b: True if the kernel reads B."""
    factor = pointer(kinds.factor)
    seed = "*i64" if kinds.dropout else None
    return {"a_ptr": factor, "b_ptr": factor if b else None, **rank_types(kinds), "seed_ptr": seed}


def low_rank_types(kinds: Kinds, transposed: bool) -> Types:
    """The types of `LowRank`; dropout concerns the backward direction (transposed) alone."""
    return {
        "left_ptr": pointer(kinds.rank),
        "right_ptr": pointer(kinds.rank),
        "bits_ptr": "*i32" if kinds.dropout and transposed else None,
        "counts_ptr": "*i32" if kinds.plan else None,
    }


def number_types() -> Types:
    """The types of `Numbers`."""
    return {"scaling": "fp32", "keep_scale": "fp32", "least": "i64"}


def size_types() -> Types:
    """The types of `Sizes`."""
    return integers("M", "N", "K", "r", "WIDTH")
