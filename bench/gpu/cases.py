"""The GPU's cases: all shapes and rows at one rank, single factors varied from a middle point, in order of weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from bench import lineup
from bench.cases import (
    ALLOCATOR,
    BACKWARD,
    DEAD,
    ENQUEUE,
    FORWARD,
    GRAPH,
    ORTHOGONALITY,
    PASSES,
    PROBE,
    RANK,
    Case,
)

# (K, N): an "11008x4096" weight has N = 11008 outputs and K = 4096 inputs.
SHAPES = ((4096, 4096), (4096, 11008), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672), (4096, 1024))
TOKENS = (1, 16, 128, 512, 2048, 8192, 16384)
RANKS = (8, 16, 64, 128)
DROPOUTS = (0.0, 0.1)
LIVE_SHARES = (100, 50, 25)
# What single factors are varied from: a small weight, where an adapter weighs most, and the largest.
MIDDLE, LARGE = (4096, 4096), (8192, 28672)
MIDDLES = (MIDDLE, LARGE)
MIDDLE_TOKENS = (2048, 8192)
# Matrix units take ranks sixteen at a time: of sixteen ranks a dead half would save nothing.
LIVE_RANK = 64
GRAPH_SHAPES, GRAPH_TOKENS = (MIDDLE, (4096, 1024)), (1, 16, 128, 512)
# Small enough for the host to be what takes time.
ENQUEUED = (4096, 1024)
# Layers that an allocator decides on: of a small model, and of a large one.
ALLOCATOR_MODULES, ALLOCATOR_RANK = (56, 224), 12
_PEFT = (lineup.PEFT_LORA_BF16, lineup.PEFT_LORA_FP32)
_PEFT_ADALORA = (lineup.PEFT_ADALORA_BF16, lineup.PEFT_ADALORA_FP32)


def _layers(
    shapes: Iterable[tuple[int, int]], tokens: Iterable[int], passes: Iterable[str] = PASSES, **fields: Any
) -> Iterator[Case]:
    # Frozen layers of large models have no bias.
    usual = Case(dtype="bf16", bias=False)
    for (k, n), m, direction in product(shapes, tokens, passes):
        yield replace(usual, direction=direction, K=k, N=n, M=m, **fields)


def _live(
    shapes: Iterable[tuple[int, int]], tokens: Iterable[int], shares: Iterable[int], **fields: Any
) -> Iterator[Case]:
    for share in shares:
        # With every rank ACTIVE there is nothing in the other state.
        masking = PROBE if share == 100 else DEAD
        yield from _layers(shapes, tokens, live=share, masking=masking, **fields)


def _enqueued() -> Iterator[Case]:
    for plain in _layers([ENQUEUED], [1], timing=ENQUEUE):
        yield from (plain, replace(plain, dropout=0.1), replace(plain, masking=PROBE))


def _allocators(shape: tuple[int, int], modules: Iterable[int]) -> Iterator[Case]:
    """A step of AdaLoRA's allocator by itself, and with the orthogonality term."""
    for count, term in product(modules, ("", ORTHOGONALITY)):
        yield Case(ALLOCATOR, term, *shape, r=ALLOCATOR_RANK, modules=count)


GROUPS: dict[str, tuple[Case, ...]] = {
    "gpu-grid": tuple(_layers(SHAPES, TOKENS)),
    "gpu-rank": tuple(case for r in RANKS if r != RANK for case in _layers(MIDDLES, MIDDLE_TOKENS, r=r)),
    "gpu-dropout": tuple(_layers(MIDDLES, MIDDLE_TOKENS, dropout=0.1)),
    "gpu-live": tuple(_live(MIDDLES, MIDDLE_TOKENS, LIVE_SHARES, r=LIVE_RANK)),
    "gpu-mixed": tuple(_layers([MIDDLE], MIDDLE_TOKENS, dtype="mixed")),
    "gpu-graph": tuple(_layers(GRAPH_SHAPES, GRAPH_TOKENS, timing=GRAPH)),
    "gpu-enqueue": tuple(_enqueued()),
    "gpu-allocator": tuple(_allocators(MIDDLE, ALLOCATOR_MODULES)),
}
SMOKE: dict[str, tuple[Case, ...]] = {
    "gpu-grid": tuple(_layers([(64, 48)], (1, 33))),
    "gpu-rank": tuple(_layers([(64, 48)], (33,), [BACKWARD], r=5)),
    "gpu-dropout": tuple(_layers([(64, 48)], (33,), [BACKWARD], dropout=0.1)),
    "gpu-live": tuple(_live([(64, 48)], (33,), (100, 50), r=8)),
    "gpu-mixed": tuple(_layers([(64, 48)], (33,), [FORWARD], dtype="mixed")),
    "gpu-graph": tuple(_layers([(64, 48)], (1,), [FORWARD], timing=GRAPH)),
    "gpu-enqueue": tuple(_layers([(64, 48)], (1,), [FORWARD], timing=ENQUEUE)),
    "gpu-allocator": tuple(_allocators((64, 48), (2,))),
}
# Sizes that end inside every tile, and that kernels which read through descriptors serve or do not: verified without
# being timed, by a memory checker too.
_EDGES, _RAGGED = (208, 144), (199, 137)
CHECKED: tuple[Case, ...] = (
    *(
        case
        for dtype in ("bf16", "fp16", "fp32")
        for case in (
            *_layers([_EDGES], (1, 67), bias=True, dtype=dtype),
            *_layers([_RAGGED], (67,), [BACKWARD], dtype=dtype),
            *_layers([_EDGES], (67,), [BACKWARD], dropout=0.1, dtype=dtype),
            *_live([_EDGES], (67,), (50,), passes=[BACKWARD], r=32, dtype=dtype),
        )
    ),
    *_layers([_EDGES], (67,), [BACKWARD], dtype="mixed"),
)


def full() -> dict[str, tuple[Case, ...]]:
    """GROUPS and, as one more, the whole cross product of shapes, rows, ranks, dropout and live shares."""
    cases = [
        case
        for r, dropout in product(RANKS, DROPOUTS)
        for case in (
            *_layers(SHAPES, TOKENS, r=r, dropout=dropout),
            *_live(SHAPES, TOKENS, LIVE_SHARES[1:], r=r, dropout=dropout),
        )
    ]
    known = {case for cases in GROUPS.values() for case in cases}
    return {**GROUPS, "gpu-full": tuple(case for case in cases if case not in known)}


def compiles(case: Case) -> bool:
    """Return True if peft under torch.compile takes part: once it is compiled, more rows cost no second compilation."""
    if case.operator == ALLOCATOR:
        return False
    usual = case.dtype == "bf16" and not case.masking and not case.dropout and not case.timing and case.r == RANK
    return usual and (case.K, case.N) == MIDDLE and case.M in MIDDLE_TOKENS


def contestants(case: Case, *, peft: bool = True, compiled: bool = False) -> tuple[str, ...]:
    """Names of everyone in the case, the bare library product first and ours last; an allocator has peft's beside it.

    Args:
        peft: HF peft is there.
        compiled: torch.compile may be called for cases that `compiles` names.
    """
    if case.operator == ALLOCATOR:
        return lineup.PEFT_ALLOCATOR, lineup.OURS
    theirs: tuple[str, ...] = ()
    if case.timing:
        theirs = (lineup.PEFT_ADALORA_BF16,) if case.masking else (lineup.PEFT_LORA_BF16,)
    elif case.masking:
        theirs = _PEFT_ADALORA
    else:
        theirs = (*_PEFT, *_PEFT_ADALORA)
        if compiled and compiles(case):
            theirs = (*theirs, lineup.COMPILED)
    if case.dtype == "mixed":
        theirs = tuple(name for name in theirs if name in (lineup.PEFT_LORA_FP32, lineup.PEFT_ADALORA_FP32))
    return (lineup.FROZEN, lineup.FLOOR, *(theirs if peft else ()), lineup.OURS)


def in_order(groups: dict[str, tuple[Case, ...]]) -> list[tuple[str, Case]]:
    """Every case once with its group, what goals speak of first: whatever time runs out for stands at the end.

    Compiling takes longer than all else a case needs, so cases with it come last of all but the cross product.
    """
    found: dict[Case, str] = {}
    for name, cases in groups.items():
        for case in cases:
            found.setdefault(case, name)

    def place(case: Case) -> int:
        if found[case] == "gpu-full":
            return 5
        if compiles(case):
            return 4
        if case.timing or case.operator == ALLOCATOR:
            return 1
        rows = case.M
        if rows in MIDDLE_TOKENS:
            return 0
        return 3 if rows > max(MIDDLE_TOKENS) else 2

    return [(found[case], case) for case in sorted(found, key=place)]


def select(ordered: Sequence[tuple[str, Case]], patterns: Sequence[str]) -> list[tuple[str, Case]]:
    """Those whose group, or a part of whose id, is in `patterns`; all of them without any."""
    return [
        (group, case)
        for group, case in ordered
        if not patterns or any(pattern == group or pattern in case.id for pattern in patterns)
    ]
