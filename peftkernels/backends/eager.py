"""Library matmuls and one in-place `addmm_`: runs on every device, in every dtype; the floor the others must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.ops import schemas
from peftkernels.ops.reference import dropout_factor


def _dropped(rows: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        return rows
    return (rows * dropout_factor(seed, p, rows.shape[0], rows.shape[1])).to(rows.dtype)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left·right in place, rounded once to its dtype."""
    if left.dtype is to.dtype:
        to.addmm_(left, right)
    else:
        to += left @ right


class _LiveRanks:
    """The factors as the matmuls use them: live ranks only, cast to `dtype`, which the products of them have.

    On the CPU live ranks are gathered by the plan's order, so a DEAD rank costs nothing and leaves the same bits as a
    call without it. On other devices reading the counts would stall the device: all ranks are multiplied, and the
    factors of DEAD ranks are replaced by zeros so that nothing of theirs, NaN included, gets through.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        dtype: torch.dtype,
        gate: Tensor | None,
        rank_state: Tensor | None,
        rank_order: Tensor | None,
        rank_counts: Tensor | None,
        scaling: float,
        scaling_tensor: Tensor | None,
    ) -> None:
        self.A, self.B = lora_A.to(dtype), lora_B.to(dtype)
        self.active_A, self.active_B = self.A, self.B
        self.n_active = lora_A.shape[0]
        self.index: Tensor | None = None
        self.active_mask: Tensor | None = None
        self.live_mask: Tensor | None = None
        self.scale = scaling if scaling_tensor is None else scaling_tensor
        gates = None if gate is None else gate.reshape(-1).to(torch.promote_types(dtype, torch.float32))

        if rank_state is not None and lora_A.device.type == "cpu":
            assert rank_order is not None and rank_counts is not None
            self.n_active, n_live = rank_counts.tolist()
            self.index = rank_order[:n_live].long()
            self.A, self.B = self.A[self.index], self.B[:, self.index]
            self.active_A, self.active_B = self.A[: self.n_active], self.B[:, : self.n_active]
            gates = None if gates is None else gates[self.index[: self.n_active]]
        elif rank_state is not None:
            self.live_mask, self.active_mask = rank_state > 0, rank_state == 2
            self.A, self.B = self.A.where(self.live_mask.unsqueeze(1), 0), self.B.where(self.live_mask, 0)
            self.active_A = self.A.where(self.active_mask.unsqueeze(1), 0)
            self.active_B = self.B.where(self.active_mask, 0)
            gates = None if gates is None else gates.where(self.active_mask, 0)
        self.factor = self.scale if gates is None else gates * self.scale

    def gated(self, product: Tensor) -> Tensor:
        """scaling · (product ⊙ ĝ) over the ACTIVE ranks, rounded once to the product's dtype."""
        active = product[:, : self.n_active]
        if self.active_mask is not None:
            # A PROBE rank's own products may hold NaN or inf, which a zero gate would not stop.
            active = active.where(self.active_mask, 0)
        return (active * self.factor).to(product.dtype)

    def scatter(self, values: Tensor, like: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
        """Put the values of the first live ranks back at their places in a tensor like `like`, zero elsewhere.

        Where every rank was multiplied, `mask` says whose values count: 0 · NaN is NaN, and what x or G hold must not
        reach ranks that receive nothing.
        """
        if self.index is None:
            if mask is not None:
                values = values.where(mask.unsqueeze(1) if values.dim() > dim + 1 else mask, 0)
            return values.to(like.dtype)
        return torch.zeros_like(like).index_copy_(dim, self.index[: values.shape[dim]], values.to(like.dtype))


def _forward(
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
    given_shrink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device.type):
        dtype, low = x.dtype, schemas.rank_dtype(x.dtype)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        live = _LiveRanks(lora_A, lora_B, low, gate, rank_state, rank_order, rank_counts, scaling, scaling_tensor)
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        if given_shrink is None:
            shrink = F.linear(_dropped(rows.to(low), dropout_p, dropout_seed), live.A)
        else:
            shrink = given_shrink if live.index is None else given_shrink[:, live.index]
        _add_product(y, live.gated(shrink), live.active_B.T)
        if not save_shrink or given_shrink is not None:
            shrink = shrink.new_empty((0, lora_A.shape[0]))
        elif live.index is not None:
            shrink = live.scatter(shrink, shrink.new_empty((rows.shape[0], lora_A.shape[0])), 1)
        # In the shape of the call, but nobody's view: what autograd takes for one, FSDP2 warns of, since an addition in
        # place would drop the hook that it sets on the output.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0])), shrink


def _shrink(x: Tensor, lora_A: list[Tensor]) -> Tensor:
    with without_autocast(x.device.type):
        low = schemas.rank_dtype(x.dtype)
        factors = torch.cat([factor.to(low) for factor in lora_A])
        return F.linear(x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(low), factors)


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    shrink: Tensor | None,
    gate: Tensor | None,
    rank_state: Tensor | None,
    rank_order: Tensor | None,
    rank_counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    with without_autocast(grad_y.device.type):
        dtype, low = grad_y.dtype, schemas.rank_dtype(grad_y.dtype)
        needs_x, needs_weight, needs_A, needs_B, needs_bias, needs_gate = needs
        results = list(schemas.empty_gradients(grad_y, weight, lora_A, lora_B, bias, gate, [False] * 6))
        grads = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
        live = _LiveRanks(lora_A, lora_B, low, gate, rank_state, rank_order, rank_counts, scaling, scaling_tensor)
        rows = None if x is None else x.reshape(grads.shape[0], x.shape[-1])
        wide = grads.to(low) if needs_x or needs_A or needs_B or needs_gate else grads
        expanded = wide @ live.B if needs_x or needs_A or needs_gate else None
        gated = None if expanded is None else live.gated(expanded)

        if needs_x:
            assert gated is not None
            grad_x = grads @ weight.to(dtype)
            if dropout_seed is None:
                _add_product(grad_x, gated, live.active_A)
            else:
                grad_x += _dropped(gated @ live.active_A, dropout_p, dropout_seed)
            results[0] = grad_x.view(*grad_y.shape[:-1], weight.shape[1])
        if needs_weight:
            assert rows is not None
            results[1] = (grads.T @ rows).to(weight.dtype)
        if needs_A:
            assert rows is not None and gated is not None
            dropped = _dropped(rows.to(low), dropout_p, dropout_seed)
            results[2] = live.scatter(gated.T @ dropped, lora_A, 0, live.active_mask)
        if needs_B or needs_gate:
            assert shrink is not None
            live_shrink = shrink if live.index is None else shrink[:, live.index]
            if needs_B:
                results[3] = live.scatter(wide.T @ live.gated(live_shrink), lora_B, 1, live.active_mask)
            if needs_gate:
                assert expanded is not None and gate is not None
                sums = torch.promote_types(dtype, torch.float32)
                grad_gate = (live_shrink.to(sums) * expanded).sum(0) * live.scale
                results[5] = live.scatter(grad_gate, gate.reshape(-1), 0, live.live_mask).view(gate.shape)
        if needs_bias:
            assert bias is not None
            results[4] = grads.sum(0, dtype=bias.dtype)
        return tuple(results)


def register() -> None:
    """Implement the `.eager` overloads on every device."""
    schemas.implement("eager", _forward, _backward, _shrink)
