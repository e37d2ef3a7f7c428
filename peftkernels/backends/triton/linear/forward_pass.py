"""y and S: the launches of the forward pass, planned once for each kind and shape of call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Frozen, LowRank, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant
from peftkernels.backends.triton.common.operands import (
    adapter_of,
    device_guard,
    is_aligned,
    kinds_of,
    rows_of,
)
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import DECODE_TILE, TMA, Tile, blocks_for, tile
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
from peftkernels.backends.triton.linear.frozen_product import TailProduct, plan_tail, resident_programs, route
from peftkernels.backends.triton.linear.shared_shrink import Parts, parts_of
from peftkernels.ops.call import Forward
from peftkernels.ops.rules import rank_dtype


@dataclass(frozen=True)
class _Shrink:
    """The launch that makes the operands of the tail.

    Attributes:
        variant: `shrink`, or `precomputed_shrink`.
        programs: Its grid.
        packs: True if it packs B; else B itself is what the tail reads.
        parts: How the shrink shares out x; None where S is precomputed.
        reduce: `reduce_rows`, which follows where the shrink's parts lie in slots.
    """

    variant: Variant
    programs: int
    packs: bool
    parts: Parts | None = None
    reduce: Variant | None = None


@dataclass(frozen=True)
class _Whole:
    """The one launch that does everything: `decode`, `single_pointer` or `single_tma`."""

    variant: Variant
    programs: int
    tile: Tile


@dataclass(frozen=True)
class _Plan:
    """The launches of a call: `whole` alone, or the shrink and then a frozen product.

    Attributes:
        sizes: The call's sizes.
        rank: The dtype of S and of compact operands.
        whole: The launch that does everything.
        shrink: The launch before the frozen product.
        tail: The frozen product with its tail; None where the library's GEMM takes its place.
        expand: What follows the library's GEMM where its `addmm_` does not take left and right.
    """

    sizes: Sizes
    rank: torch.dtype
    whole: _Whole | None = None
    shrink: _Shrink | None = None
    tail: TailProduct | None = None
    expand: Variant | None = None


def _plan_shrink(kinds: Kinds, device: torch.device, sizes: Sizes, keep: bool, precomputed: bool) -> _Shrink:
    m, n, k, r, _ = sizes
    blocks = blocks_for(kinds.x, INTERPRETED)
    # Columns of B that nobody picks, converts or pads are what the tail reads.
    packs = kinds.plan or kinds.factor is not kinds.rank or r % 16 != 0
    packing = -(-n // blocks.pack) if packs else 0
    if precomputed:
        places = block_of_places(r, blocks.shrink_places)
        gating = -(-m // blocks.reduce_lines) * -(-width(r) // places)
        return _Shrink(precomputed_shrink.variant(kinds, blocks, places, packs), gating + packing, packs)
    parts = parts_of(kinds, device, m, k, r)
    split = parts.split.splits > 1
    return _Shrink(
        shrink.variant(kinds, blocks, parts.places, keep, True, split, packs),
        parts.programs + packing,
        packs,
        parts,
        reduce_rows.variant(kinds, blocks, parts.reduce_places, keep, True, False) if split else None,
    )


def _plan_whole(kinds: Kinds, device: torch.device, choice: routes.Choice, sizes: Sizes, keep: bool) -> _Whole:
    m, n, k, r, _ = sizes
    taken = tile(choice.tile)
    if choice.route == routes.DECODE:
        variant = decode.variant(kinds, taken, block_of_places(r, decode.most_places(kinds)), keep)
        return _Whole(variant, -(-n // taken.columns), taken)
    blocks, places = blocks_for(kinds.x, INTERPRETED), block_of_places(r, pieces.MOST_PLACES)
    if taken.kind == TMA:
        variant = single_tma.variant(kinds, blocks, taken, places, keep)
    else:
        variant = single_pointer.variant(kinds, blocks, taken, places, keep, k % taken.depth == 0)
    return _Whole(variant, resident_programs(device, taken, m, n), taken)


@functools.lru_cache(maxsize=4096)
def _plan(
    kinds: Kinds,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    r: int,
    keep: bool,
    precomputed: bool,
    plain_weight: bool,
    state: tuple[routes.Choice | None, int],
) -> _Plan:
    sizes = Sizes(m, n, k, r, width(r))
    choice = route(kinds, device, routes.FORWARD, sizes, plain_weight)
    if choice.route in (routes.DECODE, routes.SINGLE):
        return _Plan(sizes, kinds.rank, whole=_plan_whole(kinds, device, choice, sizes, keep))
    shrinking = _plan_shrink(kinds, device, sizes, keep, precomputed)
    if choice.route == routes.LIBRARY:
        expanding = None if kinds.rank is kinds.x else expand.variant(kinds, False)
        return _Plan(sizes, kinds.rank, shrink=shrinking, expand=expanding)
    tail = plan_tail(kinds, device, tile(choice.tile), sizes, transposed=False)
    return _Plan(sizes, kinds.rank, shrink=shrinking, tail=tail)


def forward(call: Forward) -> tuple[Tensor, Tensor | None]:
    """y, and S where it is to be saved and not precomputed.

    Where one launch does everything, S costs no read of x, and one that is precomputed is not looked at.
    """
    x, weight, bias, shrink = call.x, call.weight, call.bias, call.given_shrink
    saves = call.save_shrink and shrink is None
    with device_guard(x):
        n, k = weight.shape
        r = call.lora_A.shape[0]
        flat = x.dim() == 2
        m = x.shape[0] if flat else x.shape[:-1].numel()
        dtype = x.dtype
        if weight.dtype is not dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        if not (m and n and k and r):
            return F.linear(x, weight, bias), x.new_zeros((m, r), dtype=rank_dtype(dtype)) if saves else None
        rows, adapter = rows_of(x), adapter_of(call)
        precomputed = None if shrink is None else rows_of(shrink)
        aligned = is_aligned((rows, weight, adapter.lora_A, adapter.lora_B), n | k | rows.stride(0))
        plan = _plan(
            kinds_of(rows, adapter, bias, aligned),
            x.device,
            m,
            n,
            k,
            r,
            saves,
            precomputed is not None,
            weight.stride() == (k, 1),
            routes.state(),
        )
        saved = x.new_empty((m, r), dtype=plan.rank) if saves else None
        y = _run(plan, Frozen(rows, weight, bias), adapter, saved, precomputed)
        return (y if flat else y.view(*x.shape[:-1], n)), saved


def _run(
    plan: _Plan, frozen: Frozen, adapter: AdapterArguments, saved: Tensor | None, precomputed: Tensor | None
) -> Tensor:
    sizes = plan.sizes
    if plan.whole is not None:
        y = frozen.rows.new_empty((sizes.m, sizes.n))
        _launch_whole(plan.whole, plan.rank, frozen, adapter, saved, y, sizes)
        return y
    left, right = _shrink_and_pack(plan, frozen.rows, adapter, saved, precomputed)
    if plan.tail is not None:
        y = frozen.rows.new_empty((sizes.m, sizes.n))
        plan.tail(frozen, LowRank(left, right, None, adapter.counts), y, 1.0)
        return y
    y = F.linear(*frozen)
    if plan.expand is None:
        return y.addmm_(left, right.T)
    expand.launch(plan.expand, y, LowRank(left, right, None, adapter.counts), 1.0, sizes)
    return y


def _launch_whole(
    whole: _Whole,
    rank: torch.dtype,
    frozen: Frozen,
    adapter: AdapterArguments,
    saved: Tensor | None,
    y: Tensor,
    sizes: Sizes,
) -> None:
    """Write y, and S where it is saved."""
    taken = whole.tile
    if taken.kind == DECODE_TILE:
        decode.launch(whole.variant, whole.programs, frozen, adapter, saved, y, sizes)
        return
    left = y.new_empty((sizes.m, sizes.width), dtype=rank)
    progress = torch.zeros(1 + -(-sizes.m // taken.rows), dtype=torch.int32, device=y.device)
    results = pieces.Results(saved, left, progress)
    if taken.kind == TMA:
        single_tma.launch(whole.variant, whole.programs, taken, frozen, adapter, results, y, sizes)
    else:
        single_pointer.launch(whole.variant, whole.programs, frozen, adapter, results, y, sizes)


def _shrink_and_pack(
    plan: _Plan, rows: Tensor, adapter: AdapterArguments, saved: Tensor | None, precomputed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make S, or take the precomputed one; left (M, width) and right (N, width) of the tail."""
    making, sizes = plan.shrink, plan.sizes
    assert making is not None and adapter.lora_B is not None
    left = rows.new_empty((sizes.m, sizes.width), dtype=plan.rank)
    packed = rows.new_empty((sizes.n, sizes.width), dtype=plan.rank) if making.packs else None
    right = adapter.lora_B if packed is None else packed
    if making.parts is None:
        assert precomputed is not None
        precomputed_shrink.launch(making.variant, making.programs, precomputed, adapter, left, packed, sizes)
        return left, right
    parts = making.parts
    if making.reduce is None:
        outputs = shrink.Outputs(saved, left, None, packed)
        shrink.launch(making.variant, making.programs, rows, adapter, outputs, sizes, parts.split)
        return left, right
    slots = rows.new_empty((parts.split.splits, sizes.m, sizes.width), dtype=torch.float32)
    outputs = shrink.Outputs(slots=slots, right=packed)
    shrink.launch(making.variant, making.programs, rows, adapter, outputs, sizes, parts.split)
    reduce_rows.launch(making.reduce, parts.reduce_programs, slots, adapter, (saved, left, None), sizes)
    return left, right
