"""The pass over all factors that keeps AdaLoRA's averages: one read of p, g, Ī and Ū, one write of Ī and Ū.

    I = |p·g|    Ī ← β1·Ī + (1-β1)·I    Ū ← β2·Ū + (1-β2)·|I - Ī|    Σ_lines Ī·Ū of every tile, by rank

Launches of an update: one that reads p and g, to see whether every product is finite (the averages may not change
where one is not), and this pass, which therefore knows on the device whether it writes; both once for every pair of
dtypes of parameters and gradients, of which models have one. Launches of the scores: one, that adds up the tiles' sums.

Bytes: a number of a factor costs 2·P for the check and 2·P + 16 for the pass, where P is the size of a parameter. For
224 modules of 4096x4096 at r = 12 there are 224·12·(4096 + 4096 + 1) = 22.0 million numbers: in fp32 176 MB and 529 MB,
37 µs and 110 µs at 4.8 TB/s; in bf16 88 MB and 441 MB, 18 µs and 92 µs. The sums are 0.7 MB. For 56 modules a quarter.
These are computed, not measured.

No product joins an addition (`enable_fp_fusion` off): each is rounded on its own, as in HF peft.
"""

import functools

import torch
import triton
import triton.language as tl

from peftkernels.backends.triton.allocation.parts import Block, address_of, block_of_ranks, lines_and_ranks, tile_of
from peftkernels.backends.triton.common.launch import TYPES, Variant, options
from peftkernels.backends.triton.common.sums import added_lines

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Numbers of a tile: sixteen a thread, of four tensors.
_TILE = 2048
WIDE = Block(512, 4)
_FEWEST_RANKS, MOST_RANKS = 4, 64
# Sums of tiles that are added at a time.
_PARTS = 32
_UNFUSED = {**options(4, 1), "enable_fp_fusion": False}


def narrow(r: int) -> Block:
    """The tile of B and E where factors have up to r ranks."""
    ranks = block_of_ranks(r, _FEWEST_RANKS, MOST_RANKS)
    return Block(_TILE // ranks, ranks)


@triton.jit
def products(
    parameters_ptr, gradients_ptr, factor, offsets, inside,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """|p·g| in fp32 for some elements of a factor, 0 elsewhere and, unless p is not finite, without a gradient."""
    parameter_ptr, _ = address_of(parameters_ptr, factor, PARAMETER, EVEN)
    gradient_ptr, there = address_of(gradients_ptr, factor, GRADIENT, EVEN)
    parameter = tl.load(parameter_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + offsets, mask=tl.where(there, inside, False), other=0.0).to(tl.float32)
    return tl.abs(parameter * gradient)


@triton.jit
def any_not_finite(
    parameters_ptr, gradients_ptr, factor, line_block, rank_block, lines, r,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, WIDE_TILE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """1 if some |p·g| of a tile is infinite or NaN, else 0."""
    _, _, offsets, inside = lines_and_ranks(line_block, rank_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN)
    importance = products(parameters_ptr, gradients_ptr, factor, offsets, inside, PARAMETER, GRADIENT, EVEN)
    bad = tl.where(importance < float("inf"), 0, 1)
    return tl.max(tl.reshape(bad, (LINES * RANKS,)), 0)


@triton.jit
def check_finite(
    tiles_ptr, factors_ptr, parameters_ptr, gradients_ptr, finite_ptr,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, WIDE_LINES: tl.constexpr, WIDE_RANKS: tl.constexpr,
    NARROW_LINES: tl.constexpr, NARROW_RANKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Find products p·g that are not finite.

    Grid: tiles of factors whose parameters have one dtype, and whose gradients have one.

    Args:
        tiles_ptr: int32 (tiles, 4), `parts.tile_table`.
        factors_ptr: int64 (all factors, 8), `parts.factor_table`.
        parameters_ptr: int64 (all factors,), where the parameters lie.
        gradients_ptr: int64 (all factors,), where the gradients lie, 0 without one.
        finite_ptr: One int32, 1 before, and 0 afterwards where some p·g of any tile is not finite.
    """
    program = tl.program_id(0)
    factor, line_block, rank_block, _, lines, r, wide, _, _ = tile_of(tiles_ptr, factors_ptr, program)
    if wide != 0:
        bad = any_not_finite(
            parameters_ptr, gradients_ptr, factor, line_block, rank_block, lines, r,
            PARAMETER, GRADIENT, True, WIDE_LINES, WIDE_RANKS, EVEN,
        )  # fmt: skip
    else:
        bad = any_not_finite(
            parameters_ptr, gradients_ptr, factor, line_block, rank_block, lines, r,
            PARAMETER, GRADIENT, False, NARROW_LINES, NARROW_RANKS, EVEN,
        )  # fmt: skip
    # Whoever comes first or last, the result is the same.
    tl.atomic_and(finite_ptr, 0, mask=bad != 0, sem="relaxed")


@triton.jit
def smoothed(average, value, beta, rest, taken):
    """β·average + (1-β)·value where the step is taken, else the average."""
    return tl.where(taken, average * beta + value * rest, average)


@triton.jit
def average_tile(
    parameters_ptr, gradients_ptr, sensitivity_ptr, uncertainty_ptr, sums_ptr,
    factor, line_block, rank_block, start, lines, r, result, beta1, rest1, beta2, rest2, taken,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, WIDE_TILE: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The averages of a tile, where they are updated, and its sum of Ī·Ū over lines."""
    _, rank, offsets, inside = lines_and_ranks(line_block, rank_block, lines, r, WIDE_TILE, LINES, RANKS, EVEN)
    sensitivities, uncertainties = sensitivity_ptr + start + offsets, uncertainty_ptr + start + offsets
    sensitivity = tl.load(sensitivities, mask=inside, other=0.0)
    uncertainty = tl.load(uncertainties, mask=inside, other=0.0)
    if parameters_ptr is not None:
        written = tl.where(taken, inside, False)
        importance = products(parameters_ptr, gradients_ptr, factor, offsets, written, PARAMETER, GRADIENT, EVEN)
        sensitivity = smoothed(sensitivity, importance, beta1, rest1, taken)
        uncertainty = smoothed(uncertainty, tl.abs(importance - sensitivity), beta2, rest2, taken)
        tl.store(sensitivities, sensitivity, mask=written)
        tl.store(uncertainties, uncertainty, mask=written)
    sums = added_lines(sensitivity * uncertainty)
    tl.store(sums_ptr + result + line_block * r + rank, sums, mask=rank < r)


@triton.jit
def update_averages(
    tiles_ptr, factors_ptr, parameters_ptr, gradients_ptr, sensitivity_ptr, uncertainty_ptr, finite_ptr, skip_ptr,
    sums_ptr, beta1, rest1, beta2, rest2,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, WIDE_LINES: tl.constexpr, WIDE_RANKS: tl.constexpr,
    NARROW_LINES: tl.constexpr, NARROW_RANKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Keep the averages and sum Ī·Ū over lines, in fp32; without parameters the averages stay and are summed alone.

    Grid: tiles of factors whose parameters have one dtype, and whose gradients have one.

    Args:
        tiles_ptr: int32 (tiles, 4), `parts.tile_table`.
        factors_ptr: int64 (all factors, 8), `parts.factor_table`.
        parameters_ptr: int64 (all factors,), where the parameters lie; or None.
        gradients_ptr: int64 (all factors,), where the gradients lie, 0 without one; or None.
        sensitivity_ptr: Ī, fp32, flat; read and written.
        uncertainty_ptr: Ū, fp32, flat; read and written.
        finite_ptr: What `check_finite` left: where 0 the averages stay; or None.
        skip_ptr: One u8: where not 0 the averages stay; or None.
        sums_ptr: fp32, for every factor (blocks of lines, r) where its row of the table says; written.
        beta1, rest1: β1 and 1-β1.
        beta2, rest2: β2 and 1-β2.
    """
    program = tl.program_id(0)
    factor, line_block, rank_block, start, lines, r, wide, _, result = tile_of(tiles_ptr, factors_ptr, program)
    taken = True
    if finite_ptr is not None:
        taken = tl.load(finite_ptr) != 0
        if skip_ptr is not None:
            taken = taken & (tl.load(skip_ptr) == 0)
    if wide != 0:
        average_tile(
            parameters_ptr, gradients_ptr, sensitivity_ptr, uncertainty_ptr, sums_ptr,
            factor, line_block, rank_block, start, lines, r, result, beta1, rest1, beta2, rest2, taken,
            PARAMETER, GRADIENT, True, WIDE_LINES, WIDE_RANKS, EVEN,
        )  # fmt: skip
    else:
        average_tile(
            parameters_ptr, gradients_ptr, sensitivity_ptr, uncertainty_ptr, sums_ptr,
            factor, line_block, rank_block, start, lines, r, result, beta1, rest1, beta2, rest2, taken,
            PARAMETER, GRADIENT, False, NARROW_LINES, NARROW_RANKS, EVEN,
        )  # fmt: skip


@triton.jit
def mean_of_parts(sums_ptr, factors_ptr, factor, rank, r, LINES_OF_PART: tl.constexpr, PARTS: tl.constexpr):
    """The mean over a factor's lines, its tiles' sums added in order."""
    lines = tl.load(factors_ptr + factor * 8 + 1).to(tl.int32)
    sums_ptr += tl.load(factors_ptr + factor * 8 + 5)
    parts = tl.cdiv(lines, LINES_OF_PART)
    total = tl.zeros((rank.shape[0],), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (rank < r)[None, :]
        total += added_lines(tl.load(sums_ptr + part[:, None] * r + rank[None, :], mask=inside, other=0.0))
    return tl.div_rn(total, lines.to(tl.float32) + tl.zeros((rank.shape[0],), tl.float32))


@triton.jit
def add_parts(
    factors_ptr, sums_ptr, scores_ptr,
    WIDE_LINES: tl.constexpr, NARROW_LINES: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """scores = s_E + (mean s_A + mean s_B) of every rank, in fp32.

    Grid: layers, whose factors A, B, E follow each other.

    Args:
        factors_ptr: int64 (all factors, 8), `parts.factor_table`.
        sums_ptr: What `update_averages` wrote.
        scores_ptr: fp32 (Σ r,); written.
    """
    factor = tl.program_id(0) * 3
    r = tl.load(factors_ptr + factor * 8 + 2).to(tl.int32)
    first = tl.load(factors_ptr + factor * 8 + 4)
    gates_ptr = sums_ptr + tl.load(factors_ptr + (factor + 2) * 8 + 5)
    for start in range(0, r, RANKS):
        rank = start + tl.arange(0, RANKS)
        wide = mean_of_parts(sums_ptr, factors_ptr, factor, rank, r, WIDE_LINES, PARTS)
        narrow_mean = mean_of_parts(sums_ptr, factors_ptr, factor + 1, rank, r, NARROW_LINES, PARTS)
        gate = tl.load(gates_ptr + rank, mask=rank < r, other=0.0)
        tl.store(scores_ptr + first + rank, gate + (wide + narrow_mean), mask=rank < r)


def _tiles(block: Block) -> dict[str, int]:
    lines, ranks = WIDE
    return {"WIDE_LINES": lines, "WIDE_RANKS": ranks, "NARROW_LINES": block.lines, "NARROW_RANKS": block.ranks}


def _label(parameter: torch.dtype, gradient: torch.dtype, block: Block, even: bool) -> str:
    gradients = "" if gradient is parameter else f", {TYPES[gradient]} gradients"
    return f"{TYPES[parameter]}{gradients} r{block.ranks}{'' if even else ' unaligned'}"


@functools.cache
def finite_variant(parameter: torch.dtype, gradient: torch.dtype, block: Block, even: bool) -> Variant:
    """`check_finite` for parameters and gradients of these dtypes."""
    types = {
        "tiles_ptr": "*i32",
        "factors_ptr": "*i64",
        "parameters_ptr": "*i64",
        "gradients_ptr": "*i64",
        "finite_ptr": "*i32",
    }
    constants = {"PARAMETER": ELEMENTS[parameter], "GRADIENT": ELEMENTS[gradient], **_tiles(block), "EVEN": even}
    label = _label(parameter, gradient, block, even)
    return Variant(check_finite, types, constants, aligned=tuple(types), options=options(4, 1), label=label)


@functools.cache
def update_variant(parameter: torch.dtype, gradient: torch.dtype, block: Block, skip: bool, even: bool) -> Variant:
    """`update_averages` for parameters and gradients of these dtypes."""
    return _averages(parameter, gradient, block, skip, even, True)


@functools.cache
def sums_variant(block: Block, even: bool) -> Variant:
    """`update_averages` that sums alone."""
    return _averages(torch.float32, torch.float32, block, False, even, False)


def _averages(
    parameter: torch.dtype, gradient: torch.dtype, block: Block, skip: bool, even: bool, update: bool
) -> Variant:
    addresses = "*i64" if update else None
    types = {
        "tiles_ptr": "*i32",
        "factors_ptr": "*i64",
        "parameters_ptr": addresses,
        "gradients_ptr": addresses,
        "sensitivity_ptr": "*fp32",
        "uncertainty_ptr": "*fp32",
        "finite_ptr": "*i32" if update else None,
        "skip_ptr": "*u8" if skip else None,
        "sums_ptr": "*fp32",
        **dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32"),
    }
    constants = {"PARAMETER": ELEMENTS[parameter], "GRADIENT": ELEMENTS[gradient], **_tiles(block), "EVEN": even}
    # A caller's bool may be one of many.
    aligned = tuple(name for name in types if name.endswith("_ptr") and name != "skip_ptr")
    label = f"{_label(parameter, gradient, block, even)}{' skip' * skip}{'' if update else ' sums alone'}"
    return Variant(update_averages, types, constants, aligned=aligned, options=_UNFUSED, label=label)


@functools.cache
def scores_variant(block: Block) -> Variant:
    """`add_parts` for tiles of this block."""
    types = {"factors_ptr": "*i64", "sums_ptr": "*fp32", "scores_ptr": "*fp32"}
    constants = {
        "WIDE_LINES": WIDE.lines,
        "NARROW_LINES": block.lines,
        "RANKS": block.ranks,
        "PARTS": _PARTS,
    }
    return Variant(add_parts, types, constants, aligned=tuple(types), options=_UNFUSED, label=f"r{block.ranks}")
