"""y and S: the launches of the forward pass, planned once for each kind and shape of call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant
from peftkernels.backends.triton.common.operands import dense, dropped, is_aligned, kinds_of, place, rows_of
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import TMA, Tile, blocks_for, tile
from peftkernels.backends.triton.kernels import (
    decode,
    expand,
    pieces,
    precomputed_shrink,
    reduce_rows,
    shrink,
    single_pointer,
    single_tma,
)
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.frozen_product import (
    TailProduct,
    descriptors,
    plan_tail,
    resident_programs,
    route,
)
from peftkernels.backends.triton.linear.shared_shrink import Parts, parts_of
from peftkernels.ops.call import Forward
from peftkernels.ops.rules import rank_dtype


@dataclass(frozen=True)
class _Shrink:
    """The launch that makes the operands of the tail.

    parts   how the shrink shares out x, and what `finish` has to do; None where S is given
    finish  follows where the shrink's parts lie in slots
    packs   whether it packs B
    """

    variant: Variant
    programs: int
    parts: Parts | None
    finish: Variant | None
    packs: bool


@dataclass(frozen=True)
class _Plan:
    """The launches of a call: `whole` alone (decode, single), or the shrink and `tail`; without a tail the library, and
    `expand` where its `addmm_` does not take left and right."""

    choice: routes.Choice
    width: int
    shrink: _Shrink | None = None
    tail: TailProduct | None = None
    expand: Variant | None = None
    whole: Variant | None = None
    tile: Tile | None = None
    programs: int = 0


def _plan_shrink(
    kinds: Kinds, device: torch.device, m: int, n: int, k: int, r: int, keep: bool, given: bool
) -> _Shrink:
    blocks = blocks_for(kinds.x, INTERPRETED)
    # B as it lies will do where its columns are already what the tail reads.
    packs = kinds.plan or kinds.factor is not kinds.rank or r % 16 != 0
    packing = -(-n // blocks.pack) if packs else 0
    if given:
        places = block_of_places(r, blocks.shrink_places)
        placing = -(-m // blocks.finish_rows) * -(-width(r) // places)
        return _Shrink(precomputed_shrink.variant(kinds, blocks, places, packs), placing + packing, None, None, packs)
    parts = parts_of(kinds, device, m, k, r)
    split = parts.splits > 1
    return _Shrink(
        shrink.variant(kinds, blocks, parts.places, keep, True, split, packs),
        parts.programs + packing,
        parts,
        reduce_rows.variant(kinds, blocks, parts.finish_places, keep, True, False) if split else None,
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
    given: bool,
    plain_weight: bool,
    state: tuple[routes.Choice | None, int],
) -> _Plan:
    choice = route(kinds, device, routes.FORWARD, m, n, k, plain_weight)
    if choice.route == routes.LIBRARY:
        expanding = None if kinds.rank is kinds.x else expand.variant(kinds, False)
        return _Plan(choice, width(r), _plan_shrink(kinds, device, m, n, k, r, keep, given), expand=expanding)
    taken = tile(choice.tile)
    if choice.route == routes.TAIL:
        tail = plan_tail(kinds, device, taken, m, n, k, transposed=False)
        return _Plan(choice, width(r), _plan_shrink(kinds, device, m, n, k, r, keep, given), tail)
    if choice.route == routes.DECODE:
        whole = decode.variant(kinds, taken, block_of_places(r, decode.most_places(kinds)), keep)
        return _Plan(choice, width(r), whole=whole, tile=taken, programs=-(-n // taken.columns))
    blocks, places = blocks_for(kinds.x, INTERPRETED), block_of_places(r, pieces.MOST_PLACES)
    if taken.kind == TMA:
        whole = single_tma.variant(kinds, blocks, taken, places, keep)
    else:
        whole = single_pointer.variant(kinds, blocks, taken, places, keep, k % taken.depth == 0)
    return _Plan(choice, width(r), whole=whole, tile=taken, programs=resident_programs(device, taken, m, n))


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
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Make S, or take the one that is given; left (M, width) and right (N, width) of the tail."""
    launch = plan.shrink
    assert launch is not None
    (m, k), (n, r) = rows.shape, lora_B.shape
    rank = rank_dtype(rows.dtype)
    left = rows.new_empty((m, plan.width), dtype=rank)
    right = rows.new_empty((n, plan.width), dtype=rank) if launch.packs else lora_B
    if launch.parts is None:
        assert given is not None
        launch.variant(
            launch.programs,
            given,
            lora_B,
            order,
            counts,
            gate,
            scaling_tensor,
            left,
            right if launch.packs else None,
            scaling,
            m,
            n,
            r,
            plan.width,
            given.stride(0),
        )
        return left, right
    split = launch.finish is not None
    slots = rows.new_empty((launch.parts.splits, m, plan.width), dtype=torch.float32) if split else None
    launch.variant(
        launch.programs,
        rows,
        lora_A,
        lora_B if launch.packs else None,
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
        launch.parts.splits,
        launch.parts.chunk,
    )
    if launch.finish is not None:
        launch.finish(
            launch.parts.finish_programs,
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
            launch.parts.splits,
        )
    return left, right


def forward(call: Forward) -> tuple[Tensor, Tensor | None]:
    """y, and S where it is to be saved and not given.

    Where one launch does everything, S costs no read of x, and one that is given is not looked at.
    """
    (
        x, weight, lora_A, lora_B, bias, gate, _, rank_order, rank_counts, scaling, scaling_tensor, dropout_p,
        dropout_seed, _, given_shrink,
    ) = call  # fmt: skip
    save_shrink = call.saves_shrink
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
            shrink_of_nothing = x.new_zeros((m, r), dtype=rank_dtype(dtype)) if save_shrink else None
            return F.linear(x, weight, bias), shrink_of_nothing
        rows = rows_of(x)
        lora_A, lora_B, gate = lora_A.contiguous(), lora_B.contiguous(), dense(gate)
        rank_order, rank_counts = dense(rank_order), dense(rank_counts)
        aligned = is_aligned((rows, weight, lora_A, lora_B), n, k, rows.stride(0))
        kinds = kinds_of(rows, lora_A, gate, scaling_tensor, rank_counts, dropout_seed, bias, aligned)
        plain_weight = weight.stride() == (k, 1)
        given = None if given_shrink is None else rows_of(given_shrink)
        plan = _plan(kinds, x.device, m, n, k, r, save_shrink, given is not None, plain_weight, routes.state())
        least, keep_scale = dropped(dropout_p, dropout_seed)
        saved = x.new_empty((m, r), dtype=kinds.rank) if save_shrink else None
        y = _run(
            plan, rows, weight, lora_A, lora_B, bias, gate, rank_order, rank_counts, scaling, scaling_tensor,
            least, keep_scale, dropout_seed, saved, given,
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
    given: Tensor | None,
) -> Tensor:
    (m, k), (n, r) = rows.shape, lora_B.shape
    if plan.whole is not None:
        assert plan.tile is not None
        numbers = (scaling, keep_scale, least, m, n, k, r, plan.width, rows.stride(0))
        factors = (lora_A, lora_B, order, counts, gate, scaling_tensor, seed, saved)
        y = rows.new_empty((m, n))
        if plan.choice.route == routes.DECODE:
            plan.whole(plan.programs, rows, weight, bias, *factors, y, *numbers)
            return y
        left = rows.new_empty((m, plan.width), dtype=rank_dtype(rows.dtype))
        # The next ticket, then the pieces done in each row block.
        progress = torch.zeros(1 + -(-m // plan.tile.rows), dtype=torch.int32, device=rows.device)
        if plan.tile.kind == TMA:
            x_w_y = descriptors(plan.tile, rows, weight, y, transposed=False)
            plan.whole(plan.programs, *x_w_y, rows, bias, *factors, left, progress, *numbers)
        else:
            plan.whole(plan.programs, rows, weight, bias, *factors, left, progress, y, *numbers)
        return y
    left, right = _shrink_and_pack(
        plan, rows, lora_A, lora_B, order, counts, gate, scaling, scaling_tensor, least, keep_scale, seed, saved, given
    )
    if plan.tail is None:
        y = F.linear(rows, weight, bias)
        if plan.expand is None:
            return y.addmm_(left, right.T)
        plan.expand(expand.programs(m, n), y, left, right, None, counts, 1.0, m, n, r, plan.width)
        return y
    y = rows.new_empty((m, n))
    plan.tail(rows, weight, y, bias, left, right, None, counts, 1.0, r)
    return y
