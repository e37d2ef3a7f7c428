"""What every strategy may look at: one number per rank, on the layers' device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftkernels.allocation.budget.budgets import Shares
from peftkernels.allocation.budget.selection import select_under_cost
from peftkernels.allocation.layers.adapted import AdaptedLayers
from peftkernels.ops.allocation_kernels import AllocationKernels


class Statistics:
    """Per-rank statistics of all layers, computed when asked for and kept until the next optimizer step.

    Vectors are (Σ r,), layers in model order, float32 (float64 where a factor is float64), and stay on the layers'
    device: no property synchronises with the host. Where factors are sharded over processes, `layers` have whole ones,
    gathered when they are looked at: strategies need not know.

    Attributes:
        names: The layers' module paths.
        layers: The layers themselves.
        ranks: The rank of each layer.
        shares: The budget bound to the layers.
        kernels: What computes on the layers' device.
        loss: The mean of the losses given to the allocator for this step, 0-dim, detached; None without any.
        step: The optimizer step that is being made, from 1 on; 0 where a captured step cannot tell the host.
        skip: None, or a 0-dim bool tensor: True asks every statistic to stay as it is.
        missing: Factors, by name, that were looked at in this step and have no gradient.
    """

    def __init__(self, layers: AdaptedLayers, kernels: AllocationKernels, shares: Shares, *, exact: bool) -> None:
        self._layers = layers
        self.names = list(layers.whole)
        self.layers = list(layers.whole.values())
        self.ranks = list(layers.ranks.values())
        self.kernels = kernels
        self.shares = shares
        self.loss: Tensor | None = None
        self._losses: list[Tensor] = []
        self.step = 0
        self.skip: Tensor | None = None
        self.missing: tuple[str, ...] = ()
        self._finite: Tensor | None = None
        self._budgets: Tensor | None = None
        self._exact = exact
        self._kept: dict[str, Tensor] = {}
        self._constants: dict[tuple[str, torch.device], Tensor] = {}

    def begin_step(self, step: int = 0, *, skip: Tensor | None = None, budgets: Tensor | None = None) -> None:
        """Forget what was computed from the factors and gradients of the step before, and take the step's losses.

        Args:
            step: The optimizer step that is being made; 0 where the host does not know it.
            skip: 0-dim bool tensor or None; True asks every statistic to stay as it is.
            budgets: The budget of every share, (S,), on the device, where the step is captured; None where the host has
                the schedule.
        """
        self.step, self.skip, self._budgets = step, skip, budgets
        self.forget()
        self._finite = None
        self.missing = ()
        self.loss = self.pending_losses.mean() if self._losses else None
        self._losses.clear()

    def report(self, finite: Tensor, missing: Sequence[str] = ()) -> None:
        """Say what was found in the gradients of this step; `Strategy.update` calls it, directly or by `smooth_`.

        A strategy that looks at more gradients than the gates' reports them; otherwise the gates' are judged.

        Args:
            finite: 0-dim bool tensor, True if all gradients that were looked at are finite.
            missing: Factors, by name, that have no gradient.
        """
        self._finite = finite if self._finite is None else self._finite & finite
        self.missing = tuple(dict.fromkeys((*self.missing, *missing)))

    @property
    def finite(self) -> Tensor:
        """0-dim bool, True if the gradients of this step are finite: those reported, or the gates' where none were."""
        return self._once("finite gates", self._gates_finite) if self._finite is None else self._finite

    def follow(self, kernels: AllocationKernels) -> None:
        """Compute with these kernels from now on, since the layers have moved to another device."""
        self.kernels = kernels

    def prepare(self) -> None:
        """Compute now what does not change, so that a captured step copies nothing to the device."""
        _ = self.costs, self.module_index, self.share_ranks

    def forget(self) -> None:
        """Compute anew what is read from now on, since the factors have been written to."""
        self._kept.clear()

    def take_loss(self, loss: Tensor | float) -> None:
        """Take a loss of the step that is being made; several count as their mean."""
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

    def restore_losses(self, losses: Tensor) -> None:
        """Take over the `pending_losses` of a saved run, and forget what was computed for this one."""
        self.forget()
        self._losses = [loss.clone() for loss in losses.to(self.device).unbind()]

    @property
    def device(self) -> torch.device:
        """The layers' device."""
        return next(iter(self._layers.own.values())).lora_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of per-rank statistics: float32, or float64 where a factor is."""
        return self._layers.dtype

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
            missing = [f"{name}.lora_E" for name, grad in zip(self.names, gradients, strict=True) if grad is None]
            self.missing = tuple(dict.fromkeys((*self.missing, *missing)))
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
        """What each rank costs in the budget's unit."""
        return self._constant("costs", lambda: self.spread(self.shares.costs))

    @property
    def module_index(self) -> Tensor:
        """The layer of each rank, int64."""
        return self._constant("module_index", lambda: self.spread(range(len(self.ranks))).to(torch.int64))

    def spread(self, per_layer: Sequence[float]) -> Tensor:
        """Repeat one number per layer for each of its ranks: (Σ r,), float64."""
        values = torch.tensor(list(per_layer), dtype=torch.float64)
        return values.repeat_interleave(torch.tensor(self.ranks)).to(self.device)

    def per_layer(self, values: Tensor) -> tuple[Tensor, ...]:
        """Cut a (Σ r,) vector into one vector per layer."""
        return values.split(self.ranks)

    def by_module(self, thresholds: Tensor) -> list[float]:
        """Return one threshold per share, read from the device, as one per layer."""
        values = thresholds.tolist()
        share_of = {member: share for share, own in enumerate(self.shares.shares) for member in own.members}
        return [values[share_of[index]] for index in range(len(self.names))]

    def smooth_(self, average: Tensor, value: Tensor, beta: float) -> None:
        """Do average ← beta·average + (1-beta)·value in place, unless `skip` is True or `value` is not finite."""
        finite = torch.isfinite(value).all()
        self.report(finite)
        taken = finite if self.skip is None else finite & ~self.skip
        torch.where(taken, average * beta + value * (1 - beta), average, out=average)

    def select(self, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Keep the highest scores that the budget after `step` allows, in each share of it by itself.

        Ranks that cost different amounts are kept by score as long as the budget lasts.

        Returns:
            The ranks to keep, bool (Σ r,), and the thresholds (S,), one per share in the order of `shares.shares`.
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
        """Return what one of the shares may cost after `step`; on the device where the step is captured."""
        if self._budgets is not None:
            return self._budgets[share]
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

    def _gates_finite(self) -> Tensor:
        """Return True (0-dim bool) if every gradient of a gate is finite; those that are missing are."""
        gradients = [layer.lora_E.grad for layer in self.layers if layer.lora_E.grad is not None]
        if not gradients:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return torch.isfinite(self._join(gradients)).all()

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
