"""The gradients: what is launched for any subset of them, planned once for each kind and shape of call.

1. `row_sums`, one read of G: the parts of H = G·B and of Gᵀ·S.
2. `reduce_rows`: H from its parts, times scaling·ĝ, and A's ACTIVE rows side by side.
3. The ∂x product: G·W with (H ⊙ ĝ)·A as its tail, or the library's GEMM and `addmm_` or `expand`.
4. `reduce_grad_B`: ∂B, and the parts of ∂gate.
5. `row_sums`, one read of x: the parts of ∂A.
6. `reduce_grad_A`: ∂A and ∂gate.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Frozen, LowRank, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant, multiprocessors
from peftkernels.backends.triton.common.operands import (
    NOTHING_TO_DO,
    adapter_of,
    dense,
    device_guard,
    is_aligned,
    kinds_of,
    rows_of,
)
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import Blocks, blocks_for, tile
from peftkernels.backends.triton.kernels import expand, keep_bits, reduce_grad_A, reduce_grad_B, reduce_rows, row_sums
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.frozen_product import TailProduct, plan_tail, route
from peftkernels.ops.call import Backward


class _Needs(NamedTuple):
    """Which gradients of an adapter and its input are needed."""

    x: bool
    lora_A: bool
    lora_B: bool
    gate: bool


class _Gradients(NamedTuple):
    """Where gradients go; each None where it is not needed."""

    x: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    gate: Tensor | None


@dataclass(frozen=True)
class _RowSums:
    """A launch of `row_sums` over G (M, N) or x (M, K).

    Attributes:
        variant: The kernel.
        programs: The grid.
        split: How the rows are split.
        sums: The shape of the sums; None where they are not asked for.
        slots: The shape of the parts of H; None where they are not asked for.
    """

    variant: Variant
    programs: int
    split: row_sums.Split
    sums: tuple[int, int, int] | None
    slots: tuple[int, int, int] | None


def _plan_row_sums(
    kinds: Kinds, blocks: Blocks, device: torch.device, sizes: Sizes, of_x: bool, sums: bool, slots: bool
) -> _RowSums:
    columns = sizes.k if of_x else sizes.n
    places = block_of_places(sizes.r, blocks.sums_places)
    tiles = -(-columns // blocks.sums_columns)
    wanted = -(-blocks.sums_spread * multiprocessors(device) // tiles)
    splits = max(1, min(wanted, -(-sizes.m // (4 * blocks.sums_rows))))
    rows = -(-sizes.m // (splits * blocks.sums_rows)) * blocks.sums_rows
    splits = -(-sizes.m // rows)
    return _RowSums(
        row_sums.variant(kinds, blocks, places, of_x, sums, slots),
        tiles * splits * -(-sizes.width // places),
        row_sums.Split(splits, rows),
        (splits, columns, sizes.width) if sums else None,
        (tiles, sizes.m, sizes.width) if slots else None,
    )


class _Reduction(NamedTuple):
    """A launch of a kernel that reduces splits: the kernel and the grid."""

    variant: Variant
    programs: int


@dataclass(frozen=True)
class _Plan:
    """What is launched for one subset of gradients; None for what is not needed.

    Attributes:
        sizes: The call's sizes.
        rank: The dtype of H and of compact operands.
        from_grads: The sums over the rows of G.
        reduce_H: `reduce_rows`.
        packs: True if it packs A's rows; else A itself is what the ∂x product reads.
        tail: The ∂x product with its tail; None where the library's GEMM takes its place.
        expand: What follows the library's GEMM where its `addmm_` does not serve.
        reduce_B: `reduce_grad_B`.
        gate_parts: The shape of the parts of ∂gate.
        from_rows: The sums over the rows of x.
        reduce_A: `reduce_grad_A`.
        bits: `keep_bits`.
    """

    sizes: Sizes
    rank: torch.dtype
    from_grads: _RowSums
    reduce_H: _Reduction | None
    packs: bool
    tail: TailProduct | None
    expand: Variant | None
    reduce_B: _Reduction | None
    gate_parts: tuple[int, int] | None
    from_rows: _RowSums | None
    reduce_A: _Reduction | None
    bits: Variant | None


@functools.lru_cache(maxsize=4096)
def _plan(
    kinds: Kinds,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    r: int,
    needs: _Needs,
    plain_weight: bool,
    state: tuple[routes.Choice | None, int],
) -> _Plan:
    sizes = Sizes(m, n, k, r, width(r))
    blocks = blocks_for(kinds.x, INTERPRETED)
    places = block_of_places(r, blocks.reduce_places)
    place_blocks = -(-sizes.width // places)
    row_blocks, n_blocks, k_blocks = (-(-size // blocks.reduce_lines) for size in (m, n, k))
    needs_H, needs_sums = needs.x or needs.lora_A, needs.lora_B or needs.gate
    # Rows of A that nobody picks, converts or pads are what the tail reads.
    packs = needs.x and (kinds.plan or kinds.factor is not kinds.rank or r % 16 != 0)
    reduce_H = reduce_B = reduce_A = tail = None
    if needs_H:
        programs = row_blocks * place_blocks + (-(-k // blocks.pack) if packs else 0)
        reduce_H = _Reduction(reduce_rows.variant(kinds, blocks, places, False, True, packs), programs)
    if needs.x:
        choice = route(kinds, device, routes.BACKWARD, sizes, plain_weight)
        if choice.route != routes.LIBRARY:
            tail = plan_tail(kinds, device, tile(choice.tile), sizes, transposed=True)
    # The library's own addition takes no dropout, and no left and right of another dtype.
    expands = needs.x and tail is None and (kinds.dropout or kinds.rank is not kinds.x)
    if needs_sums:
        variant = reduce_grad_B.variant(kinds, blocks, places, needs.lora_B, needs.gate)
        reduce_B = _Reduction(variant, n_blocks * place_blocks)
    if needs.lora_A or needs.gate:
        variant = reduce_grad_A.variant(kinds, blocks, places, needs.lora_A, needs.gate)
        reduce_A = _Reduction(variant, place_blocks * (k_blocks if needs.lora_A else 1))
    planned = functools.partial(_plan_row_sums, kinds, blocks, device, sizes)
    return _Plan(
        sizes,
        kinds.rank,
        from_grads=planned(False, needs_sums, needs_H),
        reduce_H=reduce_H,
        packs=packs,
        tail=tail,
        expand=expand.variant(kinds, True) if expands else None,
        reduce_B=reduce_B,
        gate_parts=(n_blocks, sizes.width) if needs.gate else None,
        from_rows=planned(True, True, False) if needs.lora_A else None,
        reduce_A=reduce_A,
        bits=keep_bits.variant(kinds) if kinds.dropout and needs_H else None,
    )


def backward(call: Backward) -> tuple[Tensor, ...]:
    """∂x, ∂W (never), ∂A, ∂B, ∂bias and ∂gate."""
    needs_x, needs_weight, needs_A, needs_B, needs_bias, needs_gate = call.needs
    if needs_weight:
        raise RuntimeError("impl='triton' cannot serve this call: weight requires grad, the kernels serve frozen ones")
    grad_y = call.grad_y
    # A pass that is itself recorded reaches this with gradients enabled; `functional` records it as one operator.
    with device_guard(grad_y), torch.no_grad() if torch.is_grad_enabled() else NOTHING_TO_DO:
        grad_x, grad_weight, grad_A, grad_B, grad_bias, grad_gate = call.empty_gradients()
        if needs_bias:
            rows = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
            grad_bias = rows.sum(0, dtype=grad_bias.dtype)
        if needs_x or needs_A or needs_B or needs_gate:
            needed = _Gradients(
                grad_x if needs_x else None,
                grad_A if needs_A else None,
                grad_B if needs_B else None,
                grad_gate if needs_gate else None,
            )
            _adapter_gradients(needed, call, _Needs(needs_x, needs_A, needs_B, needs_gate))
    return grad_x, grad_weight, grad_A, grad_B, grad_bias, grad_gate


def _adapter_gradients(out: _Gradients, call: Backward, needs: _Needs) -> None:
    """Write ∂x, ∂A, ∂B and ∂gate, each where it is needed."""
    grad_y, x, weight, shrink = call.grad_y, call.x, call.weight, dense(call.shrink)
    n, k = weight.shape
    r = call.lora_A.shape[0]
    m = grad_y.shape[0] if grad_y.dim() == 2 else grad_y.shape[:-1].numel()
    if weight.dtype is not grad_y.dtype:
        weight = weight.to(grad_y.dtype)
    if 0 in (m, n, k, r):
        for gradient in out:
            if gradient is not None:
                gradient.zero_()
        if out.x is not None and m and k:
            torch.mm(grad_y.reshape(m, n), weight, out=out.x.view(m, k))
        return
    grads = rows_of(grad_y)
    rows = None if x is None else rows_of(x)
    adapter = adapter_of(call)
    tensors = (grads, weight, adapter.lora_A, adapter.lora_B, rows, shrink)
    sizes = n | k | grads.stride(0) | (0 if rows is None else rows.stride(0))
    kinds = kinds_of(grads, adapter, None, is_aligned(tensors, sizes))
    plan = _plan(kinds, grads.device, m, n, k, r, needs, weight.stride() == (k, 1), routes.state())
    bits = None if plan.bits is None else keep_bits.launch(plan.bits, adapter, plan.sizes)

    left = None if plan.reduce_B is None else shrink
    sums, slots = _row_sums(plan.from_grads, grads, left, None, adapter, plan.sizes)
    low_rank = None
    if plan.reduce_H is not None:
        assert slots is not None
        low_rank = _reduce_H(plan, plan.reduce_H, slots, adapter, bits)
    if out.x is not None:
        assert low_rank is not None
        _grad_x(plan, out.x.view(m, k), Frozen(grads, weight), low_rank, adapter.numbers.keep_scale)
    gate_parts = None
    if plan.reduce_B is not None:
        assert sums is not None
        if plan.gate_parts is not None:
            gate_parts = grads.new_empty(plan.gate_parts, dtype=torch.float32)
        reduce_grad_B.launch(*plan.reduce_B, sums, adapter, (out.lora_B, gate_parts), plan.sizes)
    if plan.reduce_A is None:
        return
    parts = None
    if plan.from_rows is not None:
        assert rows is not None and low_rank is not None
        parts, _ = _row_sums(plan.from_rows, rows, low_rank.left, bits, adapter, plan.sizes)
    reduce_grad_A.launch(*plan.reduce_A, (parts, gate_parts), adapter, (out.lora_A, out.gate), plan.sizes)


def _row_sums(
    launch: _RowSums, rows: Tensor, left: Tensor | None, bits: Tensor | None, adapter: AdapterArguments, sizes: Sizes
) -> tuple[Tensor | None, Tensor | None]:
    """Sums over the rows of G or x, and the parts of H, each where it is asked for."""
    results = (
        None if launch.sums is None else rows.new_empty(launch.sums, dtype=torch.float32),
        None if launch.slots is None else rows.new_empty(launch.slots, dtype=torch.float32),
    )
    row_sums.launch(launch.variant, launch.programs, rows, left, bits, adapter, results, sizes, launch.split)
    return results


def _reduce_H(
    plan: _Plan, launch: _Reduction, slots: Tensor, adapter: AdapterArguments, bits: Tensor | None
) -> LowRank:
    """Gated H, and A's rows as the ∂x product reads them."""
    _, _, k, _, wide = plan.sizes
    left = slots.new_empty((plan.sizes.m, wide), dtype=plan.rank)
    packed = slots.new_empty((wide, k), dtype=plan.rank) if plan.packs else None
    reduce_rows.launch(*launch, slots, adapter, (None, left, packed), plan.sizes)
    return LowRank(left, adapter.lora_A if packed is None else packed, bits, adapter.counts)


def _grad_x(plan: _Plan, grad_x: Tensor, frozen: Frozen, low_rank: LowRank, keep_scale: float) -> None:
    """∂x (M, K) = G·W + drop'(left·right)."""
    if plan.tail is not None:
        plan.tail(frozen, low_rank, grad_x, keep_scale)
        return
    torch.mm(frozen.rows, frozen.weight, out=grad_x)
    if plan.expand is None:
        grad_x.addmm_(low_rank.left, low_rank.right)
        return
    expand.launch(plan.expand, grad_x, low_rank, keep_scale, plan.sizes)
