"""How factors are cut into the tiles of programs, and the tables on the device that say so.

A factor is walked by *lines* and ranks: a line is a column of A (r, K) or a row of B (N, r), whatever has r numbers;
E (r, 1) is one line. A program holds a tile of lines and ranks, finds its place in a table of tiles, and what it must
know of the factor in a table of factors: grids of any mixture of shapes are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.allocation.addresses import sent

# Numbers of a factor in the device's table, and of a tile.
FACTOR_FIELDS, TILE_FIELDS = 8, 4


class Block(NamedTuple):
    """Lines and ranks of a program's tile, both powers of two."""

    lines: int
    ranks: int

    def blocks(self, lines: int, r: int) -> tuple[int, int]:
        """Blocks of lines and blocks of ranks of a factor."""
        return -(-lines // self.lines), -(-r // self.ranks)


class Factor(NamedTuple):
    """A factor as the device's table has it.

    Attributes:
        start: Where its numbers begin in the flat buffer they lie in, in elements, a multiple of 16.
        lines: K for A, N for B, 1 for E.
        r: Its ranks.
        wide: 1 for A, whose ranks are rows; 0 for B and E.
        first: Its first rank among the ranks of all layers.
        result: Where its results begin: partial sums (parts, r), or a matrix (r, r).
    """

    start: int
    lines: int
    r: int
    wide: int
    first: int
    result: int


def block_of_ranks(r: int, least: int, most: int) -> int:
    """Ranks that a program holds where factors have up to r: a power of two."""
    return max(least, min(most, triton.next_power_of_2(r)))


def factor_table(factors: Sequence[Factor], device: torch.device) -> Tensor:
    """int64 (factors, FACTOR_FIELDS)."""
    padding = (0,) * (FACTOR_FIELDS - len(Factor._fields))
    rows = torch.tensor([(*factor, *padding) for factor in factors], dtype=torch.int64)
    return sent(rows.reshape(-1, FACTOR_FIELDS), device)


def tile_table(
    factors: Sequence[Factor], numbers: Sequence[int], wide: Block, narrow: Block, device: torch.device
) -> tuple[Tensor, int]:
    """int32 (tiles, TILE_FIELDS), each the number of its factor, of its block of lines and of its block of ranks, and
    how many there are, for the factors with these numbers. wide: the tile of A, narrow: of B and E.
    """
    blocks = [
        (number, *(wide if factors[number].wide else narrow).blocks(factors[number].lines, factors[number].r))
        for number in numbers
    ]
    number, lines, ranks = torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3).unbind(1)
    counts = lines * ranks
    owner = torch.arange(len(blocks)).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(owner)) - first[owner]
    columns = (number[owner], place // ranks[owner], place % ranks[owner], torch.zeros_like(owner))
    return sent(torch.stack(columns, 1).to(torch.int32), device), len(owner)


@triton.jit
def tile_of(tiles_ptr, factors_ptr, program):
    """Of a tile: its factor's number and its blocks; of the factor: start, lines, r, wide, first, result."""
    tile = tiles_ptr + program * 4
    factor = tl.load(tile)
    fields = factors_ptr + factor * 8
    start = tl.multiple_of(tl.load(fields), 16)
    lines = tl.load(fields + 1).to(tl.int32)
    r = tl.load(fields + 2).to(tl.int32)
    wide, first, result = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    return factor, tl.load(tile + 1), tl.load(tile + 2), start, lines, r, wide, first, result


@triton.jit
def multiple_of_four(number):
    """A multiple of 4, known to the compiler as one: hints on a function's arguments are lost on its way to loads."""
    return number // 4 * 4


@triton.jit
def lines_and_ranks(
    line_block, rank_block, lines, r, WIDE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr
):
    """The lines and the ranks of a tile, where its elements (LINES, RANKS) lie in the factor, and which there are.

    EVEN: lines of A and ranks of B come four at a time, so that four neighbours are one load.
    """
    line = line_block * LINES + tl.arange(0, LINES)
    rank = rank_block * RANKS + tl.arange(0, RANKS)
    if WIDE:
        if EVEN:
            lines = multiple_of_four(lines)
        offsets = rank[None, :] * lines + line[:, None]
    else:
        if EVEN:
            r = multiple_of_four(r)
        offsets = line[:, None] * r + rank[None, :]
    return line, rank, offsets, (line < lines)[:, None] & (rank < r)[None, :]


@triton.jit
def address_of(addresses_ptr, number, DTYPE: tl.constexpr, EVEN: tl.constexpr):
    """Tensor `number` of a table of addresses, and whether there is one. EVEN: it begins at a multiple of 16 bytes."""
    address = tl.load(addresses_ptr + number)
    pointer = address.to(tl.pointer_type(DTYPE))
    if EVEN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer, address != 0
