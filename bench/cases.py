"""The registry: every case there is, in named groups. Nothing here computes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

LAYER, ALLOCATOR, STRATEGIES, TRAINING = "layer", "allocator", "strategies", "training"
FORWARD, BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, BACKWARD)
# What an allocator's step is timed together with.
ORTHOGONALITY = "orthogonality"
PROBE, DEAD = "PROBE", "DEAD"
CALLS, GRAPH, ENQUEUE = "", "graph", "enqueue"
# x, weight and bias in the first dtype, the adapter's factors and its gate in the second.
DTYPES = {
    "fp32": ("float32", "float32"),
    "bf16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
    "fp16": ("float16", "float16"),
}

WIDTHS = (
    (384, 384),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 1024),
    (2048, 2048),
    (4096, 4096),
    (4096, 11008),
)
TOKENS = (1, 16, 128, 512, 2048)
TRAINING_TOKENS = (128, 512, 2048)
RANK = 16
# Layers of a small and of a base encoder at a usual batch: what single factors are varied from.
MIDDLE = (768, 3072)
MIDDLES = ((768, 768), MIDDLE)
MIDDLE_TOKENS = 512
GROWTH_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GROWTH_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
LIVE_SHARES = (100, 75, 50, 25, 0)
ALLOCATOR_MODULES = (36, 56, 72, 224)
REGULARIZED_MODULES = (56, 72, 224)
MINILM_MODULES, LLAMA_MODULES = 36, 56


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        operator: LAYER: one linear layer with an adapter; ALLOCATOR: one step of AdaLoRA's rank allocation; STRATEGIES:
            one step by each strategy; TRAINING: one whole training step of `model`.
        direction: of a layer: FORWARD without gradients, or BACKWARD: forward, then ∂x and every adapter gradient; of
            the allocator: "", or ORTHOGONALITY: the value of the orthogonality term and its gradient besides.
        K: inputs of the layer.
        N: outputs of the layer.
        M: rows of x; the tokens of a training step's batch.
        r: ranks of the adapter.
        masking: "": a LoRA layer, no gate. PROBE or DEAD: an AdaLoRA layer with a gate, of whose ranks `live` percent
            are ACTIVE and the others in that state.
        dtype: a name of DTYPES.
        dropout: probability with which elements of the adapter's input are dropped.
        bias: True if the layer has one.
        modules: how many modules the allocator decides on, or have an adapter in the model.
        timing: CALLS: a call from start to end. On a GPU also GRAPH: the same calls replayed from a CUDA graph; and
            ENQUEUE: the host's time to enqueue a call, whatever the device does with it.
    """

    operator: str = LAYER
    direction: str = ""
    K: int = 0
    N: int = 0
    M: int = 0
    r: int = RANK
    live: int = 100
    masking: str = ""
    dtype: str = "fp32"
    dropout: float = 0.0
    bias: bool = True
    modules: int = 1
    model: str = ""
    timing: str = CALLS

    @property
    def id(self) -> str:
        """A stable name: `forward/768x3072/M512/r16/fp32`, with what departs from the usual behind it."""
        if self.operator in (ALLOCATOR, STRATEGIES):
            name = "+".join(filter(None, (self.operator, self.direction)))
            return f"{name}/{self.modules}-modules/{self.K}x{self.N}/r{self.r}"
        if self.operator == TRAINING:
            return f"training/{self.model}/M{self.M}/{self.modules}-modules"
        parts = [self.direction, f"{self.K}x{self.N}", f"M{self.M}", f"r{self.r}", self.dtype]
        if self.masking:
            parts.append(f"live{self.live}-{self.masking}")
        if self.dropout:
            parts.append(f"dropout{self.dropout:g}")
        if not self.bias:
            parts.append("no-bias")
        if self.timing:
            parts.append(self.timing)
        return "/".join(parts)

    @property
    def trains(self) -> bool:
        """True where a layer's case computes gradients."""
        return self.direction == BACKWARD

    @property
    def active_ranks(self) -> int:
        """How many ranks are ACTIVE."""
        return self.r * self.live // 100

    @property
    def live_ranks(self) -> int:
        """How many ranks are not DEAD."""
        return self.active_ranks if self.masking == DEAD else self.r


def _layers(
    widths: Iterable[tuple[int, int]] = (MIDDLE,),
    tokens: Iterable[int] = (MIDDLE_TOKENS,),
    passes: Iterable[str] = PASSES,
    **fields: Any,
) -> Iterator[Case]:
    """One case for each width, pass and number of tokens; cases of one width follow each other and share its weight."""
    tokens, passes = tuple(tokens), tuple(passes)
    for k, n in widths:
        for direction in passes:
            for m in tokens:
                yield replace(Case(direction=direction, K=k, N=n, M=m), **fields)


def _low_precision(dtype: str) -> Iterator[Case]:
    for width in WIDTHS:
        yield from _layers([width], (1, *TRAINING_TOKENS), [FORWARD], dtype=dtype)
        yield from _layers([width], TRAINING_TOKENS, [BACKWARD], dtype=dtype)


def _live() -> Iterator[Case]:
    # With every rank ACTIVE there is nothing in the other state: one case stands for both.
    for masking in (PROBE, DEAD):
        for share in LIVE_SHARES[masking == DEAD :]:
            yield from _layers(MIDDLES, live=share, masking=masking)


def _half_dead() -> Iterator[Case]:
    for r in (16, 64):
        yield from _layers(
            ((384, 384), *MIDDLES, (2048, 2048)), TRAINING_TOKENS, [BACKWARD], r=r, live=50, masking=DEAD
        )


def training_case(model: str, tokens: int, modules: int) -> Case:
    """One whole training step."""
    return Case(TRAINING, M=tokens, modules=modules, model=model, r=12)


GROUPS: dict[str, tuple[Case, ...]] = {
    "grid-fp32": tuple(_layers(WIDTHS, TOKENS)),
    "grid-bf16": tuple(_low_precision("bf16")),
    "grid-mixed": tuple(_low_precision("mixed")),
    "tokens": tuple(_layers([MIDDLE], GROWTH_TOKENS)),
    "rank": tuple(case for r in GROWTH_RANKS for case in _layers(r=r))
    + tuple(case for r in (4, 64, 256) for case in _layers([(768, 768)], r=r)),
    "live": tuple(_live()),
    "half-dead": tuple(_half_dead()),
    "dropout": tuple(_layers((*MIDDLES, (2048, 2048)), TRAINING_TOKENS, dropout=0.1)),
    "bias": tuple(_layers(bias=False)),
    "allocator": tuple(Case(ALLOCATOR, K=768, N=768, r=12, modules=modules) for modules in ALLOCATOR_MODULES),
    "allocator+orthogonality": tuple(
        Case(ALLOCATOR, ORTHOGONALITY, K=768, N=768, r=12, modules=modules) for modules in REGULARIZED_MODULES
    ),
    "strategies": (Case(STRATEGIES, K=768, N=768, r=12, modules=MINILM_MODULES),),
    "training": (
        training_case("minilm", 1024, MINILM_MODULES),
        training_case("minilm", 2048, MINILM_MODULES),
        training_case("llama", 512, LLAMA_MODULES),
    ),
    "modules": tuple(training_case("minilm", 1024, modules) for modules in (1, 12, 24, MINILM_MODULES)),
}
QUICK = (
    *_layers(MIDDLES, (1, 128, MIDDLE_TOKENS), [FORWARD]),
    *_layers(MIDDLES, (128, MIDDLE_TOKENS), [BACKWARD]),
    *_layers(dtype="bf16"),
    *_layers(passes=[BACKWARD], live=50, masking=DEAD),
    GROUPS["allocator"][0],
)


def group_of(case: Case) -> str:
    """The first group that has the case."""
    return next(name for name, cases in GROUPS.items() if case in cases)


def all_cases() -> list[Case]:
    """Every case once, group by group."""
    return list(dict.fromkeys(case for cases in GROUPS.values() for case in cases))


def select(patterns: Sequence[str]) -> list[Case]:
    """The cases that one of `patterns` names: a group, a glob over ids, or a part of an id. All of them without one.

    Raises:
        ValueError: a pattern names no case.
    """
    if not patterns:
        return all_cases()
    chosen: dict[Case, None] = {}
    for pattern in patterns:
        named = GROUPS.get(pattern) or [
            case for case in all_cases() if pattern in case.id or fnmatch.fnmatchcase(case.id, pattern)
        ]
        if not named:
            raise ValueError(
                f"no case {pattern!r}; expected a part of an id, a glob over ids, or a group of "
                f"{', '.join(GROUPS)} (--list shows them all)"
            )
        chosen.update(dict.fromkeys(named))
    return [case for case in all_cases() if case in chosen]
