"""Library matmuls and one in-place `addmm_`: runs on every device, in every dtype; the floor the others must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.backends.backend import Allocation, Backend
from peftkernels.backends.eager.allocation import EagerKernels
from peftkernels.ops.call import Adapter, Backward, Forward, Needs, Request, Shrink
from peftkernels.ops.reference import dropout_factor
from peftkernels.ops.rules import rank_dtype


def _dropped(rows: Tensor, adapter: Adapter) -> Tensor:
    seed = adapter.dropout_seed
    if seed is None:
        return rows
    assert isinstance(seed, Tensor)
    return (rows * dropout_factor(seed, adapter.dropout_p, rows.shape[0], rows.shape[1])).to(rows.dtype)


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

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        lora_A, lora_B, rank_state = adapter.lora_A, adapter.lora_B, adapter.rank_state
        self.A, self.B = lora_A.to(dtype), lora_B.to(dtype)
        self.active_A, self.active_B = self.A, self.B
        self.n_active = lora_A.shape[0]
        self.index: Tensor | None = None
        self.active_mask: Tensor | None = None
        self.live_mask: Tensor | None = None
        self.scale = adapter.scale
        gates = None if adapter.gate is None else adapter.gate.reshape(-1).to(torch.promote_types(dtype, torch.float32))

        if rank_state is not None and lora_A.device.type == "cpu":
            assert adapter.rank_order is not None and adapter.rank_counts is not None
            self.n_active, n_live = adapter.rank_counts.tolist()
            self.index = adapter.rank_order[:n_live].long()
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


def _forward(call: Forward) -> tuple[Tensor, Tensor | None]:
    x, adapter = call.x, call.adapter
    with without_autocast(x.device.type):
        dtype, low = x.dtype, rank_dtype(x.dtype)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        live = _LiveRanks(adapter, low)
        y = F.linear(rows, call.weight.to(dtype), None if call.bias is None else call.bias.to(dtype))
        if call.given_shrink is None:
            shrink = F.linear(_dropped(rows.to(low), adapter), live.A)
        else:
            shrink = call.given_shrink if live.index is None else call.given_shrink[:, live.index]
        _add_product(y, live.gated(shrink), live.active_B.T)
        saved = None
        if call.saves_shrink:
            saved = shrink
            if live.index is not None:
                saved = live.scatter(shrink, shrink.new_empty((rows.shape[0], adapter.lora_A.shape[0])), 1)
        # In the shape of the call, but nobody's view: what autograd takes for one, FSDP2 warns of, since an addition in
        # place would drop the hook that it sets on the output.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], call.weight.shape[0])), saved


def _shrink(call: Shrink) -> Tensor:
    x = call.x
    with without_autocast(x.device.type):
        low = rank_dtype(x.dtype)
        factors = torch.cat([factor.to(low) for factor in call.lora_A])
        return F.linear(x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(low), factors)


def _backward(call: Backward) -> tuple[Tensor, ...]:
    grad_y, x, adapter, needs = call.grad_y, call.x, call.adapter, Needs(*call.needs)
    with without_autocast(grad_y.device.type):
        dtype, low = grad_y.dtype, rank_dtype(grad_y.dtype)
        results = list(call.empty_gradients([False] * 6))
        grads = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
        live = _LiveRanks(adapter, low)
        rows = None if x is None else x.reshape(grads.shape[0], x.shape[-1])
        wide = grads.to(low) if needs.x or needs.lora_A or needs.lora_B or needs.gate else grads
        expanded = wide @ live.B if needs.x or needs.lora_A or needs.gate else None
        gated = None if expanded is None else live.gated(expanded)

        if needs.x:
            assert gated is not None
            grad_x = grads @ call.weight.to(dtype)
            if adapter.dropout_seed is None:
                _add_product(grad_x, gated, live.active_A)
            else:
                grad_x += _dropped(gated @ live.active_A, adapter)
            results[0] = grad_x.view(*grad_y.shape[:-1], call.weight.shape[1])
        if needs.weight:
            assert rows is not None
            results[1] = (grads.T @ rows).to(call.weight.dtype)
        if needs.lora_A:
            assert rows is not None and gated is not None
            dropped = _dropped(rows.to(low), adapter)
            results[2] = live.scatter(gated.T @ dropped, adapter.lora_A, 0, live.active_mask)
        if needs.lora_B or needs.gate:
            shrink = call.shrink
            assert shrink is not None
            live_shrink = shrink if live.index is None else shrink[:, live.index]
            if needs.lora_B:
                results[3] = live.scatter(wide.T @ live.gated(live_shrink), adapter.lora_B, 1, live.active_mask)
            if needs.gate:
                gate = adapter.gate
                assert expanded is not None and gate is not None
                sums = torch.promote_types(dtype, torch.float32)
                grad_gate = (live_shrink.to(sums) * expanded).sum(0) * live.scale
                results[5] = live.scatter(grad_gate, gate.reshape(-1), 0, live.live_mask).view(gate.shape)
        if needs.bias:
            assert call.bias is not None
            results[4] = grads.sum(0, dtype=call.bias.dtype)
        return tuple(results)


def _no_disadvantage(request: Request) -> None:
    return None


def _serves_averages(device: torch.device, dtype: torch.dtype) -> None:
    return None


BACKEND = Backend(
    "eager",
    disadvantage=_no_disadvantage,
    forward=_forward,
    backward=_backward,
    shrink=_shrink,
    allocation=Allocation(_serves_averages, _serves_averages, EagerKernels),
)
