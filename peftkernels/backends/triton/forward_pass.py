"""y and S: the launches of the forward pass, planned once for each kind and shape of call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels.backends.triton import decode, finish, gemm, routes, shrink, single
from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import (
    INTERPRETED,
    Variant,
    capability,
    descriptor_of,
    gpu_name,
    multiprocessors,
    overlaps,
)
from peftkernels.backends.triton.operands import dense, dropped, fp32_precision, is_aligned, place, rows_of
from peftkernels.backends.triton.ranks import block_of_places, width
from peftkernels.backends.triton.tiles import TMA, Tile, blocks_for, tile


@dataclass(frozen=True)
class _Shrink:
    """The shrink launch. splits > 1: its parts lie in slots, and `finish` follows."""

    variant: Variant
    programs: int
    splits: int
    chunk: int
    finish: Variant | None
    finish_programs: int
    packs: bool


@dataclass(frozen=True)
class _Plan:
    """The launches of a call and what they need."""

    choice: routes.Choice
    tile: Tile | None
    width: int
    shrink: _Shrink | None
    product: Variant | None
    programs: int


def _plan_shrink(kinds: Kinds, device: torch.device, m: int, n: int, k: int, r: int, keep: bool) -> _Shrink:
    blocks = blocks_for(kinds.x, INTERPRETED)
    places = block_of_places(r, blocks.shrink_places)
    # B as it lies will do where its columns are already what the tail reads.
    packs = kinds.plan or kinds.factor is not kinds.x or r % 16 != 0
    row_blocks = -(-m // blocks.shrink_rows)
    wanted = blocks.shrink_spread * multiprocessors(device) // row_blocks
    most = -(-k // (blocks.fewest_steps * blocks.shrink_depth))
    splits = max(1, min(wanted, most))
    chunk = -(-k // (splits * blocks.shrink_depth)) * blocks.shrink_depth
    splits = -(-k // chunk)
    place_blocks = -(-width(r) // places)
    finishing = block_of_places(r, finish.MOST_PLACES)
    split = splits > 1
    return _Shrink(
        shrink.variant(kinds, blocks, places, keep, split, packs),
        row_blocks * splits * place_blocks + (-(-n // blocks.pack) if packs else 0),
        splits,
        chunk,
        finish.rows_variant(kinds, blocks, finishing, keep, True, False) if split else None,
        -(-m // blocks.finish_rows) * -(-width(r) // finishing),
        packs,
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    kinds: Kinds,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    r: int,
    keep: bool,
    plain_weight: bool,
    state: tuple[routes.Choice | None, int],
) -> _Plan:
    choice = route(kinds, device, routes.FORWARD, m, n, k, plain_weight)
    if choice.route == routes.LIBRARY:
        return _Plan(choice, None, width(r), _plan_shrink(kinds, device, m, n, k, r, keep), None, 0)
    taken = tile(choice.tile)
    tiles = -(-m // taken.rows) * -(-n // taken.columns)
    resident = min(tiles, multiprocessors(device) * taken.programs)
    even = k % taken.depth == 0
    if choice.route == routes.DECODE:
        variant = decode.variant(kinds, taken, block_of_places(r, decode.MOST_PLACES), keep)
        return _Plan(choice, taken, width(r), None, variant, -(-n // taken.columns))
    if choice.route == routes.SINGLE:
        blocks, places = blocks_for(kinds.x, INTERPRETED), block_of_places(r, single.MOST_PLACES)
        if taken.kind == TMA:
            variant = single.tma_variant(kinds, blocks, taken, places, keep)
        else:
            variant = single.pointer_variant(kinds, blocks, taken, places, keep, even)
        return _Plan(choice, taken, width(r), None, variant, resident)
    shrinking = _plan_shrink(kinds, device, m, n, k, r, keep)
    if taken.kind == TMA:
        return _Plan(choice, taken, width(r), shrinking, gemm.tma_variant(kinds, taken, False), resident)
    return _Plan(choice, taken, width(r), shrinking, gemm.pointer_variant(kinds, taken, False, even), tiles)


def route(
    kinds: Kinds, device: torch.device, direction: str, m: int, n: int, k: int, plain_weight: bool
) -> routes.Choice:
    """The choice that serves a call: the table's, or the library where a view's layout rules it out.

    RuntimeError where a forced choice cannot serve.
    """
    product = routes.Product(direction, str(kinds.x).removeprefix("torch."), m, n, k)
    choice, reason = routes.choose(product, gpu_name(device), capability(device))
    if choice.route == routes.LIBRARY:
        return choice
    forced = reason == routes.FORCED
    obstacle = None
    if not plain_weight:
        obstacle = "the weight's rows are not contiguous"
    elif not kinds.aligned and (tile(choice.tile).kind == TMA or not forced):
        # Pointers serve any alignment, element by element: slower than the library, right where they are asked for.
        obstacle = "an operand is not aligned to 16 bytes"
    if obstacle is None:
        return choice
    if forced:
        raise RuntimeError(f"choice {str(choice)!r} cannot serve this call: {obstacle}")
    return routes.Choice(routes.LIBRARY)


def _shrink_and_pack(
    plan: _Plan,
    rows: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    order: Tensor | None,
    counts: Tensor | None,
    gate: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    least: int,
    keep_scale: float,
    seed: Tensor | None,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the shrink; left (M, width) and right (N, width) of the tail."""
    launch = plan.shrink
    assert launch is not None
    (m, k), (n, r) = rows.shape, lora_B.shape
    left = rows.new_empty((m, plan.width))
    right = rows.new_empty((n, plan.width)) if launch.packs else lora_B
    split = launch.finish is not None
    slots = rows.new_empty((launch.splits, m, plan.width), dtype=torch.float32) if split else None
    launch.variant(
        launch.programs,
        rows,
        lora_A,
        lora_B,
        order,
        counts,
        gate,
        scaling_tensor,
        seed,
        None if split else saved,
        None if split else left,
        slots,
        right if launch.packs else None,
        scaling,
        keep_scale,
        least,
        m,
        n,
        k,
        r,
        plan.width,
        rows.stride(0),
        launch.splits,
        launch.chunk,
    )
    if launch.finish is not None:
        launch.finish(
            launch.finish_programs,
            slots,
            order,
            counts,
            gate,
            scaling_tensor,
            saved,
            left,
            None,
            None,
            scaling,
            m,
            k,
            r,
            plan.width,
            launch.splits,
        )
    return left, right


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    rank_state: Tensor | None,
    rank_order: Tensor | None,
    rank_counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    save_shrink: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and S where it is to be saved; arguments as declared in `_ops`."""
    with place(x):
        n, k = weight.shape
        r = lora_A.shape[0]
        flat = x.dim() == 2
        m = x.shape[0] if flat else x.shape[:-1].numel()
        dtype = x.dtype
        if weight.dtype is not dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        if not (m and n and k and r):
            return F.linear(x, weight, bias), x.new_zeros((m, r)) if save_shrink else None
        rows = rows_of(x)
        lora_A, lora_B, gate = lora_A.contiguous(), lora_B.contiguous(), dense(gate)
        kinds = Kinds(
            dtype,
            lora_A.dtype,
            None if gate is None else gate.dtype,
            None if scaling_tensor is None else scaling_tensor.dtype,
            rank_counts is not None,
            dropout_seed is not None,
            bias is not None,
            is_aligned((rows, weight, lora_A, lora_B), n, k, rows.stride(0)),
            r % 16 == 0,
            k % 4 == 0,
            fp32_precision(dtype),
            overlaps(x.device),
        )
        plain_weight = weight.stride() == (k, 1)
        plan = _plan(kinds, x.device, m, n, k, r, save_shrink, plain_weight, routes.state())
        least, keep_scale = dropped(dropout_p, dropout_seed)
        saved = x.new_empty((m, r)) if save_shrink else None
        y = _run(
            plan, rows, weight, lora_A, lora_B, bias, gate, rank_order, rank_counts, scaling, scaling_tensor,
            least, keep_scale, dropout_seed, saved,
        )  # fmt: skip
        return (y if flat else y.view(*x.shape[:-1], n)), saved


def _run(
    plan: _Plan,
    rows: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    least: int,
    keep_scale: float,
    seed: Tensor | None,
    saved: Tensor | None,
) -> Tensor:
    (m, k), (n, r) = rows.shape, lora_B.shape
    numbers = (scaling, keep_scale, least, m, n, k, r, plan.width, rows.stride(0))
    if plan.shrink is None:
        assert plan.product is not None and plan.tile is not None
        y = rows.new_empty((m, n))
        factors = (lora_A, lora_B, order, counts, gate, scaling_tensor, seed, saved)
        if plan.choice.route == routes.DECODE:
            plan.product(plan.programs, rows, weight, bias, *factors, y, *numbers)
            return y
        left = rows.new_empty((m, plan.width))
        # The next ticket, then the pieces done in each row block.
        progress = torch.zeros(1 + -(-m // plan.tile.rows), dtype=torch.int32, device=rows.device)
        if plan.tile.kind == TMA:
            descriptors = _descriptors(plan.tile, rows, weight, y, transposed=False)
            plan.product(plan.programs, *descriptors, rows, bias, *factors, left, progress, *numbers)
        else:
            plan.product(plan.programs, rows, weight, bias, *factors, left, progress, y, *numbers)
        return y
    left, right = _shrink_and_pack(
        plan, rows, lora_A, lora_B, order, counts, gate, scaling, scaling_tensor, least, keep_scale, seed, saved
    )
    if plan.product is None:
        y = F.linear(rows, weight, bias)
        return y.addmm_(left, right.T)
    y = rows.new_empty((m, n))
    multiply(plan.product, plan.programs, plan.tile, rows, weight, y, bias, left, right, None, counts, 1.0, r, False)
    return y


def _descriptors(tile: Tile, rows: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> list[object]:
    blocks = gemm.descriptor_blocks(tile, transposed)
    return [descriptor_of(tensor, block) for tensor, block in zip((rows, weight, y), blocks, strict=True)]


def multiply(
    product: Variant,
    programs: int,
    tile: Tile | None,
    rows: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    bits: Tensor | None,
    counts: Tensor | None,
    keep_scale: float,
    r: int,
    transposed: bool,
) -> None:
    """Launch a GEMM with its tail: y = rows·Wop + left·right."""
    assert tile is not None
    (m, q), p = rows.shape, y.shape[1]
    if tile.kind == TMA:
        descriptors = _descriptors(tile, rows, weight, y, transposed)
        product(programs, *descriptors, bias, left, right, bits, counts, keep_scale, m, p, q, r, left.shape[1])
    else:
        product(
            programs, rows, weight, bias, left, right, bits, counts, y, keep_scale, m, p, q, r, left.shape[1],
            rows.stride(0),
        )  # fmt: skip
