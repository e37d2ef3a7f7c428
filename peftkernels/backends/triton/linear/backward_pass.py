"""The gradients: what is launched for any subset of them, planned once for each kind and shape of call.

column_products  one read of G: the parts of H = G·B and of Gᵀ·S
finish_rows      H from its parts, times scaling·ĝ, and A's ACTIVE rows side by side
the ∂x product   G·W with (H ⊙ ĝ)·A as its tail, or the library's GEMM and `addmm_` or `expand`
finish_grad_B    ∂B, and the parts of ∂gate
column_products  one read of x: the parts of ∂A
finish_grad_A    ∂A and ∂gate
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import INTERPRETED, Variant, multiprocessors
from peftkernels.backends.triton.common.operands import dense, dropped, is_aligned, kinds_of, place, rows_of
from peftkernels.backends.triton.common.ranks import block_of_places, width
from peftkernels.backends.triton.common.tiles import Blocks, blocks_for, tile
from peftkernels.backends.triton.kernels import expand, keep_bits, reduce_grad_A, reduce_grad_B, reduce_rows, row_sums
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.frozen_product import TailProduct, plan_tail, route
from peftkernels.ops.call import Backward, Needs


@dataclass(frozen=True)
class _Columns:
    """A launch of `column_products` over in (M, C)."""

    variant: Variant
    programs: int
    splits: int
    rows_of_split: int
    tiles: int


def _plan_columns(
    kinds: Kinds, blocks: Blocks, device: torch.device, m: int, c: int, r: int, compact: bool, sums: bool, slots: bool
) -> _Columns:
    places = block_of_places(r, blocks.column_places)
    tiles = -(-c // blocks.column_columns)
    wanted = -(-blocks.column_spread * multiprocessors(device) // tiles)
    splits = max(1, min(wanted, -(-m // (4 * blocks.column_rows))))
    rows_of_split = -(-m // (splits * blocks.column_rows)) * blocks.column_rows
    splits = -(-m // rows_of_split)
    variant = row_sums.variant(kinds, blocks, places, compact, sums, slots)
    return _Columns(variant, tiles * splits * -(-width(r) // places), splits, rows_of_split, tiles)


@dataclass(frozen=True)
class _Plan:
    """What is launched for one subset of gradients; None for what is not needed."""

    width: int
    blocks: Blocks
    place_blocks: int
    packs: bool
    from_grads: _Columns | None
    from_rows: _Columns | None
    finish_H: Variant | None
    grad_B: Variant | None
    grad_A: Variant | None
    bits: Variant | None
    tail: TailProduct | None
    expand: Variant | None


@functools.lru_cache(maxsize=4096)
def _plan(
    kinds: Kinds,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    r: int,
    needs: tuple[bool, bool, bool, bool],
    plain_weight: bool,
    state: tuple[routes.Choice | None, int],
) -> _Plan:
    needs_x, needs_A, needs_B, needs_gate = needs
    blocks = blocks_for(kinds.x, INTERPRETED)
    places = block_of_places(r, blocks.reduce_places)
    needs_H, needs_sums = needs_x or needs_A, needs_B or needs_gate
    # A as it lies will do where its rows are already what the tail reads.
    packs = needs_x and (kinds.plan or kinds.factor is not kinds.rank or r % 16 != 0)
    tail = None
    if needs_x:
        choice = route(kinds, device, routes.BACKWARD, m, n, k, plain_weight)
        if choice.route != routes.LIBRARY:
            tail = plan_tail(kinds, device, tile(choice.tile), m, n, k, transposed=True)
    # The library's own addition takes no dropout, and no left and right of another dtype.
    expands = needs_x and tail is None and (kinds.dropout or kinds.rank is not kinds.x)
    planned = functools.partial(_plan_columns, kinds, blocks, device, m)
    return _Plan(
        width(r),
        blocks,
        -(-width(r) // places),
        packs,
        planned(n, r, False, needs_sums, needs_H) if needs_H or needs_sums else None,
        planned(k, r, True, True, False) if needs_A else None,
        reduce_rows.variant(kinds, blocks, places, False, True, packs) if needs_H else None,
        reduce_grad_B.variant(kinds, blocks, places, needs_B, needs_gate) if needs_sums else None,
        reduce_grad_A.variant(kinds, blocks, places, needs_A, needs_gate) if needs_A or needs_gate else None,
        keep_bits.variant(kinds) if kinds.dropout and needs_H else None,
        tail,
        expand.variant(kinds, True) if expands else None,
    )


def _column_products(
    launch: _Columns,
    values: Tensor,
    left: Tensor | None,
    lora_B: Tensor | None,
    bits: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    keep_scale: float,
    r: int,
    sums: bool,
    slots: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """fp32 sums (splits, C, width) and slots (tiles, M, width), each where it is asked for."""
    (m, c), wide = values.shape, width(r)
    summed = values.new_empty((launch.splits, c, wide), dtype=torch.float32) if sums else None
    parts = values.new_empty((launch.tiles, m, wide), dtype=torch.float32) if slots else None
    launch.variant(
        launch.programs,
        values,
        left,
        lora_B,
        bits,
        order,
        counts,
        summed,
        parts,
        keep_scale,
        m,
        c,
        r,
        wide,
        values.stride(0),
        launch.splits,
        launch.rows_of_split,
    )
    return summed, parts


def backward(call: Backward) -> tuple[Tensor, ...]:
    """∂x, ∂W (never), ∂A, ∂B, ∂bias and ∂gate."""
    (
        grad_y, x, weight, lora_A, lora_B, _, shrink, gate, _, rank_order, rank_counts, scaling, scaling_tensor,
        dropout_p, dropout_seed, _,
    ) = call  # fmt: skip
    needs = Needs(*call.needs)
    if needs.weight:
        raise RuntimeError("impl='triton' cannot serve this call: weight requires grad, the kernels serve frozen ones")
    # A pass that is itself recorded reaches this with gradients enabled; `functional` records it as one operator.
    with place(grad_y), torch.no_grad():
        results = list(call.empty_gradients())
        if needs.bias:
            rows = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
            results[4] = rows.sum(0, dtype=results[4].dtype)
        _adapter_gradients(
            results, grad_y, x, weight.to(grad_y.dtype), lora_A, lora_B, shrink, gate, rank_order, rank_counts,
            scaling, scaling_tensor, dropout_p, dropout_seed, (needs.x, needs.lora_A, needs.lora_B, needs.gate),
        )  # fmt: skip
    return tuple(results)


def _adapter_gradients(
    results: list[Tensor],
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrink: Tensor | None,
    gate: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> None:
    """Write ∂x, ∂A, ∂B and ∂gate into `results`, each where it is needed."""
    needs_x, needs_A, needs_B, needs_gate = needs
    if not any(needs):
        return
    n, k = weight.shape
    r = lora_A.shape[0]
    m = grad_y.shape[:-1].numel()
    if 0 in (m, n, k, r):
        for index, needed in zip((0, 2, 3, 5), needs, strict=True):
            if needed:
                results[index].zero_()
        if needs_x and m and k:
            torch.mm(grad_y.reshape(m, n), weight, out=results[0].view(m, k))
        return
    grads = rows_of(grad_y)
    rows = None if x is None else rows_of(x)
    lora_A, lora_B, gate = lora_A.contiguous(), lora_B.contiguous(), dense(gate)
    shrink, order, counts = dense(shrink), dense(order), dense(counts)
    tensors = [grads, weight, lora_A, lora_B, *(tensor for tensor in (rows, shrink) if tensor is not None)]
    strides = (grads.stride(0), 0 if rows is None else rows.stride(0))
    kinds = kinds_of(grads, lora_A, gate, scaling_tensor, counts, seed, None, is_aligned(tensors, n, k, *strides))
    plan = _plan(kinds, grads.device, m, n, k, r, needs, weight.stride() == (k, 1), routes.state())
    least, keep_scale = dropped(dropout_p, seed)
    bits = None
    if plan.bits is not None:
        words = -(-k // 32)
        bits = grads.new_empty((m, words), dtype=torch.int32)
        programs = -(-m // keep_bits.BITS_ROWS) * -(-words // keep_bits.BITS_WORDS)
        plan.bits(programs, seed, bits, m, k, least)

    assert plan.from_grads is not None
    needs_H, needs_sums = needs_x or needs_A, needs_B or needs_gate
    sums, parts = _column_products(
        plan.from_grads, grads, shrink if needs_sums else None, lora_B if needs_H else None, None, order, counts,
        keep_scale, r, needs_sums, needs_H,
    )  # fmt: skip
    left = right = None
    if plan.finish_H is not None:
        left = grads.new_empty((m, plan.width), dtype=kinds.rank)
        right = grads.new_empty((plan.width, k), dtype=kinds.rank) if plan.packs else lora_A
        programs = -(-m // plan.blocks.finish_rows) * plan.place_blocks
        programs += -(-k // plan.blocks.pack) if plan.packs else 0
        plan.finish_H(
            programs,
            parts,
            order,
            counts,
            gate,
            scaling_tensor,
            None,
            left,
            lora_A if plan.packs else None,
            right if plan.packs else None,
            scaling,
            m,
            k,
            r,
            plan.width,
            plan.from_grads.tiles,
        )
    if needs_x:
        assert left is not None and right is not None
        _grad_x(plan, results[0].view(m, k), grads, weight, left, right, bits, counts, keep_scale, r)
    gate_parts = None
    if plan.grad_B is not None:
        column_blocks = -(-n // plan.blocks.finish_rows)
        gate_parts = grads.new_empty((column_blocks, plan.width), dtype=torch.float32) if needs_gate else None
        plan.grad_B(
            column_blocks * plan.place_blocks,
            sums,
            lora_B if needs_gate else None,
            order,
            counts,
            gate,
            scaling_tensor,
            results[3] if needs_B else None,
            gate_parts,
            scaling,
            n,
            r,
            plan.width,
            plan.from_grads.splits,
        )
    if plan.grad_A is None:
        return
    from_rows, programs = None, plan.place_blocks
    if plan.from_rows is not None:
        assert rows is not None
        from_rows, _ = _column_products(
            plan.from_rows, rows, left, None, bits, order, counts, keep_scale, r, True, False
        )
        programs *= -(-k // plan.blocks.finish_rows)
    plan.grad_A(
        programs,
        from_rows,
        gate_parts,
        order,
        counts,
        scaling_tensor,
        results[2] if needs_A else None,
        results[5] if needs_gate else None,
        scaling,
        k,
        r,
        plan.width,
        0 if plan.from_rows is None else plan.from_rows.splits,
        0 if gate_parts is None else gate_parts.shape[0],
    )


def _grad_x(
    plan: _Plan,
    grad_x: Tensor,
    grads: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    bits: Tensor | None,
    counts: Tensor | None,
    keep_scale: float,
    r: int,
) -> None:
    """∂x (M, K) = G·W + drop'(left·right)."""
    if plan.tail is not None:
        plan.tail(grads, weight, grad_x, None, left, right, bits, counts, keep_scale, r)
        return
    torch.mm(grads, weight, out=grad_x)
    if plan.expand is None:
        grad_x.addmm_(left, right)
        return
    m, k = grad_x.shape
    plan.expand(expand.programs(m, k), grad_x, left, right, bits, counts, keep_scale, m, k, r, plan.width)
