"""Host side of the orthogonality term: tables of the factors, and which launches it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from peftkernels.backends.triton.allocation import orthogonality
from peftkernels.backends.triton.allocation.addresses import Addresses, Tensors, capturing, sent
from peftkernels.backends.triton.allocation.averages import ELEMENTS
from peftkernels.backends.triton.allocation.parts import Block, Factor, factor_table, tile_table

# Gradients that are written begin at multiples of this many elements.
_ALIGNMENT = 16


class _Group(NamedTuple):
    """Factors of one dtype: their numbers, and their tiles of the second launch."""

    dtype: torch.dtype
    numbers: Tensor
    factors: int
    tiles: Tensor
    programs: int


class _Shapes(NamedTuple):
    """All that follows from the factors' shapes and dtypes.

    Attributes:
        table: `parts.factor_table`.
        groups: The factors by dtype.
        block: What a program of the first launch holds.
        one_block: True if that is all ranks of a factor.
        even: True if lines of A and ranks of B come four at a time.
        matrices: Numbers of all M.
        gradients: Numbers of all gradients side by side.
        starts: Where each gradient begins among them.
    """

    table: Tensor
    groups: tuple[_Group, ...]
    block: Block
    one_block: bool
    even: bool
    matrices: int
    gradients: int
    starts: tuple[int, ...]


class Term:
    """The orthogonality term of one list of adapters."""

    def __init__(self) -> None:
        self._factors = Addresses("the factors lora_A, lora_B", self._take)
        self._targets = Addresses("the tensors that gradients are added to", self._check_targets)
        self._alike: tuple[tuple[tuple[int, int], torch.dtype], ...] = ()
        self._known: _Shapes | None = None
        self._matrices = torch.empty(0)
        self._norms = torch.empty(0)

    def compute(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        weight: float,
        keep: Sequence[Tensor] | None,
        add_to: Sequence[Tensor] | None,
        scale: float,
        gradients: bool,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """`AllocationKernels.orthogonality`."""
        factors = [*lora_A, *lora_B]
        device = factors[0].device
        recording = capturing(device)
        if self._factors.update(factors, device, recording):
            self._targets.forget()
        known = self._known
        assert known is not None
        even = known.even and self._factors.aligned
        if add_to is not None:
            self._targets.update(add_to, device, recording)
            even = even and self._targets.aligned
        kept = None if keep is None else torch.cat([part.reshape(-1) for part in keep]).view(torch.uint8)
        for dtype, numbers, count, _, _ in known.groups:
            gram = orthogonality.gram_variant(dtype, known.block, known.one_block, kept is not None, even)
            gram(count, known.table, numbers, self._factors.table, kept, self._matrices, self._norms)
        value = torch.empty((), dtype=torch.float32, device=device)
        to_addresses = out = None
        if add_to is not None:
            to_addresses = self._targets.table
        else:
            # Without gradients it is not written to.
            out = torch.empty(known.gradients, dtype=torch.float32, device=device) if gradients else value
        share = weight / len(factors)
        for index, (dtype, _, _, tiles, programs) in enumerate(known.groups):
            first = index == 0
            written = programs if to_addresses is not None or gradients else 0
            if not first and not written:
                continue
            variant = orthogonality.gradient_variant(dtype, first, to_addresses is not None, kept is not None, even)
            variant(
                written + first, tiles, known.table, self._factors.table, to_addresses, out, kept, self._matrices,
                self._norms, value if first else None, share, scale, len(factors),
            )  # fmt: skip
        if add_to is not None:
            self._targets.write_back(add_to)
            torch.autograd.graph.increment_version(add_to)
            return value, None
        if not gradients:
            return value, None
        assert out is not None
        return value, [
            out[start : start + factor.numel()].view(factor.shape)
            for start, factor in zip(known.starts, factors, strict=True)
        ]

    def _take(self, tensors: Tensors) -> None:
        factors = [factor for factor in tensors if factor is not None]
        device = factors[0].device
        shapes = tuple((factor.shape[0], factor.shape[1]) for factor in factors)
        dtypes = tuple(factor.dtype for factor in factors)
        for index, dtype in enumerate(dtypes):
            if dtype not in ELEMENTS:
                name = f"lora_A[{index}]" if index < len(factors) // 2 else f"lora_B[{index - len(factors) // 2}]"
                raise TypeError(f"{name}: found {dtype}, expected float32, float16 or bfloat16")
        known = _shapes(shapes, dtypes, device)
        if known is not self._known:
            self._matrices = torch.empty(known.matrices, dtype=torch.float32, device=device)
            self._norms = torch.empty(len(factors), dtype=torch.float32, device=device)
            self._known = known
        self._alike = tuple(zip(shapes, dtypes, strict=True))

    def _check_targets(self, add_to: Tensors) -> None:
        if len(add_to) != len(self._alike):
            raise ValueError(f"add_to: found {len(add_to)} tensors, expected {len(self._alike)}")
        for index, (target, (shape, dtype)) in enumerate(zip(add_to, self._alike, strict=True)):
            if target is None or target.shape != shape or target.dtype is not dtype:
                found = "None" if target is None else f"{target.dtype} {tuple(target.shape)}"
                raise ValueError(f"add_to[{index}]: found {found}, expected {dtype} {shape} as its factor has")


@lru_cache(maxsize=8)
def _shapes(shapes: tuple[tuple[int, int], ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> _Shapes:
    n = len(shapes) // 2
    ranks = [rows for rows, _ in shapes[:n]]
    firsts = [0, *accumulate(ranks)]
    factors, starts, matrices, gradients = [], [], 0, 0
    for number, (rows, columns) in enumerate(shapes):
        wide = number < n
        r, lines = (rows, columns) if wide else (columns, rows)
        if r != ranks[number % n]:
            raise ValueError(
                f"lora_B[{number - n}]: found shape {(rows, columns)}, expected (N, {ranks[number % n]}) as lora_A has"
            )
        factors.append(Factor(gradients, lines, r, int(wide), firsts[number % n], matrices))
        starts.append(gradients)
        matrices += r * r
        gradients += -(-lines * r // _ALIGNMENT) * _ALIGNMENT
    most = max(ranks)
    block, tile = orthogonality.gram_block(most), orthogonality.TILE
    groups = []
    for dtype in dict.fromkeys(dtypes):
        numbers = [number for number, other in enumerate(dtypes) if other is dtype]
        tiles, programs = tile_table(factors, numbers, tile, tile, device)
        listed = sent(torch.tensor(numbers, dtype=torch.int32), device)
        groups.append(_Group(dtype, listed, len(numbers), tiles, programs))
    return _Shapes(
        factor_table(factors, device),
        tuple(groups),
        block,
        most <= block.ranks,
        all(r % 4 == 0 for r in ranks) and all(k % 4 == 0 for _, k in shapes[:n]),
        matrices,
        gradients,
        tuple(starts),
    )
