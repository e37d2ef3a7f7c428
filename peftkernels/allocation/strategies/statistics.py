"""The statistics bus: what every strategy may look at, one number per rank, on the layers' device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftkernels.allocation.budget.budgets import Shares
from peftkernels.allocation.budget.selection import select_under_cost
from peftkernels.allocation.layers.gated import FACTORS, GatedLayer
from peftkernels.allocation.layers.sharding import ShardedFactors

if TYPE_CHECKING:
    from peftkernels.allocation.kernels import AllocationKernels


class Statistics:
    """Per-rank statistics of all layers, computed when asked for and kept until the next optimizer step.

    Vectors are (Σ r,), layers in model order, float32 (float64 where a factor is float64), and stay on the layers'
    device: no property synchronises with the host.

    names, ranks   layers by module path, and the rank of each
    layers         the layers themselves
    shares         the budget bound to the layers
    costs          (Σ r,) what each rank costs in the budget's unit
    module_index   (Σ r,) int64, the layer of each rank
    loss           the mean of the losses given to the allocator for this step, 0-dim, detached; None without any
    step           the optimizer step that is being made, from 1 on; 0 where a captured step cannot tell the host
    skip           None, or a 0-dim bool tensor: True asks every statistic to stay as it is
    finite         None, or a 0-dim bool tensor: whether the step's gradients were finite. A strategy that looks at more
                   of them than the gates' sets it in `update`, as `smooth_` does; otherwise the gates' are judged

    Where factors are sharded over processes, `layers` have whole ones, gathered when they are looked at: strategies
    need not know.
    """

    def __init__(
        self,
        layers: Mapping[str, GatedLayer],
        kernels: AllocationKernels,
        shares: Shares,
        *,
        exact: bool,
        sharded: ShardedFactors | None = None,
    ) -> None:
        # Asking a whole factor for its dtype would gather it.
        self._own: Mapping[str, GatedLayer] = layers if sharded is None else sharded.own
        self.names = list(layers)
        self.layers = list(layers.values())
        self.ranks = [layer.lora_E.shape[0] for layer in self._own.values()]
        self.kernels = kernels
        self.shares = shares
        self.loss: Tensor | None = None
        self._losses: list[Tensor] = []
        self.step = 0
        self.skip: Tensor | None = None
        self.finite: Tensor | None = None
        self.missing: tuple[str, ...] = ()
        self.device_budgets: Tensor | None = None
        self._exact = exact
        self._kept: dict[str, Tensor] = {}
        self._constants: dict[tuple[str, torch.device], Tensor] = {}

    def begin_step(self, step: int = 0) -> None:
        """Forget what was computed from the factors and gradients of the step before, and take the step's losses."""
        self.step = step
        self.forget()
        self.finite = None
        self.missing = ()
        self.loss = self.pending_losses.mean() if self._losses else None
        self._losses.clear()

    def prepare(self) -> None:
        """Compute now what does not change, so that a captured step copies nothing to the device."""
        _ = self.costs, self.module_index, self.share_ranks

    def forget(self) -> None:
        """The factors have been written to: compute anew what is asked for."""
        self._kept.clear()

    def take_loss(self, loss: Tensor | float) -> None:
        """A loss of the step that is being made; several count as their mean."""
        if isinstance(loss, Tensor):
            value = loss.detach().to(device=self.device, dtype=torch.promote_types(loss.dtype, torch.float32))
        else:
            value = torch.tensor(loss, dtype=torch.float64, device=self.device)
        if value.numel() != 1:
            raise ValueError(f"loss: found shape {tuple(value.shape)}, expected one number")
        self._losses.append(value.reshape(()).clone())

    @property
    def pending_losses(self) -> Tensor:
        """The losses given since the last step, (n,)."""
        return torch.stack(self._losses) if self._losses else torch.zeros(0, device=self.device)

    @pending_losses.setter
    def pending_losses(self, losses: Tensor) -> None:
        self._losses = [loss.clone() for loss in losses.to(self.device).unbind()]

    def gates_finite(self) -> Tensor:
        """Whether every gradient of a gate is finite, 0-dim bool; those that are missing are."""
        gradients = [layer.lora_E.grad for layer in self.layers if layer.lora_E.grad is not None]
        if not gradients:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return torch.isfinite(self._join(gradients)).all()

    @property
    def device(self) -> torch.device:
        return next(iter(self._own.values())).lora_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.dtype_of(self._own)

    @staticmethod
    def dtype_of(layers: Mapping[str, GatedLayer]) -> torch.dtype:
        """The dtype of statistics over these layers: float32, or float64 where a factor is."""
        dtype = torch.float32
        for layer in layers.values():
            for factor in FACTORS:
                dtype = torch.promote_types(dtype, getattr(layer, factor).dtype)
        return dtype

    @property
    def total(self) -> int:
        """Σ r."""
        return sum(self.ranks)

    @property
    def gates(self) -> Tensor:
        """e, the gate of each rank."""
        return self._once("gates", lambda: self._join([layer.lora_E.detach() for layer in self.layers]))

    @property
    def gate_gradients(self) -> Tensor:
        """∂e, the gradient of each gate as the optimizer saw it; zero where a layer has none."""

        def join() -> Tensor:
            gradients = [layer.lora_E.grad for layer in self.layers]
            self.missing = tuple(
                f"{name}.lora_E" for name, grad in zip(self.names, gradients, strict=True) if grad is None
            )
            pairs = zip(self.layers, gradients, strict=True)
            return self._join([torch.zeros_like(layer.lora_E) if grad is None else grad for layer, grad in pairs])

        return self._once("gate_gradients", join)

    @property
    def norms_A(self) -> Tensor:
        """‖A_i‖, the norm of each row of A."""
        return self._once("norms_A", lambda: self._norms([layer.lora_A for layer in self.layers], 1))

    @property
    def norms_B(self) -> Tensor:
        """‖B_i‖, the norm of each column of B."""
        return self._once("norms_B", lambda: self._norms([layer.lora_B for layer in self.layers], 0))

    @property
    def costs(self) -> Tensor:
        return self._constant("costs", lambda: self.spread(self.shares.costs))

    @property
    def module_index(self) -> Tensor:
        return self._constant("module_index", lambda: self.spread(range(len(self.ranks))).to(torch.int64))

    def spread(self, per_layer: Sequence[float]) -> Tensor:
        """One number per layer, repeated for each of its ranks: (Σ r,), float64."""
        values = torch.tensor(list(per_layer), dtype=torch.float64)
        return values.repeat_interleave(torch.tensor(self.ranks)).to(self.device)

    def per_layer(self, values: Tensor) -> tuple[Tensor, ...]:
        """A (Σ r,) vector cut into one vector per layer."""
        return values.split(self.ranks)

    def by_module(self, thresholds: Tensor) -> list[float]:
        """One threshold per share, read from the device, as one per layer."""
        values = thresholds.tolist()
        share_of = {member: share for share, own in enumerate(self.shares.shares) for member in own.members}
        return [values[share_of[index]] for index in range(len(self.names))]

    def smooth_(self, average: Tensor, value: Tensor, beta: float) -> None:
        """average ← beta·average + (1-beta)·value, in place, unless value is not finite somewhere or `skip` holds."""
        finite = torch.isfinite(value).all()
        self.finite = finite if self.finite is None else self.finite & finite
        taken = finite if self.skip is None else finite & ~self.skip
        torch.where(taken, average * beta + value * (1 - beta), average, out=average)

    def select(self, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Keep the highest scores that the budget after `step` allows, in each share of it by itself.

        Returns keep, bool (Σ r,), and the thresholds (S,), one per share in the order of `shares.shares`. Ranks that
        cost different amounts are kept by score as long as the budget lasts.
        """
        if len(self.shares.shares) == 1:
            keep, threshold = self._select(scores, None, 0, step)
            return keep, threshold.reshape(1)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        thresholds = []
        for index, ranks in enumerate(self.share_ranks):
            kept, threshold = self._select(scores[ranks], ranks, index, step)
            keep[ranks] = kept
            thresholds.append(threshold)
        return keep, torch.stack(thresholds)

    def share_budget(self, share: int, step: int) -> float | Tensor:
        """What one of the shares may cost after `step`; on the device where the step is captured."""
        if self.device_budgets is not None:
            return self.device_budgets[share]
        return self.shares.shares[share].schedule(step)[0]

    @property
    def share_ranks(self) -> list[Tensor]:
        """For each share, the positions of its ranks in a (Σ r,) vector, int64."""

        starts = [sum(self.ranks[:index]) for index in range(len(self.ranks))]

        def positions(members: Sequence[int]) -> Tensor:
            own = [starts[member] + rank for member in members for rank in range(self.ranks[member])]
            return torch.tensor(own, dtype=torch.int64, device=self.device)

        return [
            self._constant(f"share {index}", lambda share=share: positions(share.members))  # type: ignore[misc]
            for index, share in enumerate(self.shares.shares)
        ]

    def _select(self, scores: Tensor, ranks: Tensor | None, share: int, step: int) -> tuple[Tensor, Tensor]:
        budget = self.share_budget(share, step)
        if self.shares.uniform:
            return self.kernels.select(scores, budget if isinstance(budget, Tensor) else int(budget), self._exact)
        costs = self.costs if ranks is None else self.costs[ranks]
        return select_under_cost(scores, costs, self.shares.prices(share), budget, exact=self._exact)

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            with torch.no_grad():
                self._kept[name] = compute()
        return self._kept[name]

    def _constant(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        key = (name, self.device)
        if key not in self._constants:
            self._constants[key] = compute()
        return self._constants[key]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts]).to(self.dtype)

    def _norms(self, factors: Sequence[Tensor], dim: int) -> Tensor:
        dtype = self.dtype
        return torch.cat([torch.linalg.vector_norm(factor, dim=dim, dtype=dtype) for factor in factors])
