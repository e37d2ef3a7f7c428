"""How much the loss still depends on every module: a running mean of its gates' gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.state_checks import check_floats, check_names, check_not_negative, check_tensor


class ModuleGradientAverage:
    """v_k ← β·v_k + (1-β)·mean |∂e_i| over the kept ranks i of module k; `value` is v_k/(1 - βᵗ) after t steps.

    Steps whose gate gradients are not finite are left out. The averages are float64 (n,) on the layers' device; taking
    a step in does not synchronise with the host. Gates' gradients are linear in the loss, so this is right under
    accumulation and data parallelism.
    """

    def __init__(self, beta: float) -> None:
        check_smoothing("beta", beta)
        self.beta = beta
        self._sums: Tensor | None = None
        self._weight: Tensor | None = None

    def update(self, allocator: BudgetAllocator) -> None:
        """Take in the gradients of the step that the allocator has just made.

        Raises:
            ValueError: Where the averages are those of another number of modules.
        """
        statistics, keep = allocator.statistics, allocator.masks.keep
        if self._sums is None or self._weight is None:
            self._sums = torch.zeros(len(statistics.names), dtype=torch.float64, device=statistics.device)
            self._weight = torch.zeros((), dtype=torch.float64, device=statistics.device)
        if len(self._sums) != len(statistics.names):
            raise ValueError(f"state: found averages of {len(self._sums)} modules, expected {len(statistics.names)}")
        self._sums, self._weight = self._sums.to(statistics.device), self._weight.to(statistics.device)
        sizes = torch.where(keep, statistics.gate_gradients.abs(), 0.0).double()
        empty = torch.zeros_like(self._sums)
        counts = empty.index_add(0, statistics.module_index, keep.double()).clamp(min=1.0)
        means = empty.index_add(0, statistics.module_index, sizes) / counts
        finite = torch.isfinite(means).all()
        self._sums = torch.where(finite, self.beta * self._sums + (1 - self.beta) * means, self._sums)
        self._weight = torch.where(finite, self.beta * self._weight + (1 - self.beta), self._weight)

    @property
    def value(self) -> Tensor:
        """The averages (n,), zero before the first step.

        Raises:
            RuntimeError: Before `update`.
        """
        if self._sums is None or self._weight is None:
            raise RuntimeError("the average has not seen a step yet")
        return self._sums / self._weight.clamp(min=torch.finfo(torch.float64).tiny)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages; empty before the first step."""
        if self._sums is None or self._weight is None:
            return {}
        return {"sums": self._sums.clone(), "weight": self._weight.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, for anything else.
        """
        if isinstance(state, Mapping) and not state:
            self._sums = self._weight = None
            return
        check_names(state, ("sums", "weight"))
        length = check_floats(state, "sums", None).shape
        sums = check_not_negative(check_tensor(state, "sums", length, torch.float64), "sums")
        weight = check_not_negative(check_tensor(state, "weight", torch.Size(()), torch.float64), "weight")
        # The weight tends to 1 from below; rounding may carry it a little past.
        if weight > 1 + 1e-6 or (weight == 0 and bool(sums.any())):
            wanted = "a number above 0 beside such sums" if weight == 0 else "at most 1"
            raise ValueError(f"state['weight']: found {float(weight)}, expected {wanted}")
        self._sums, self._weight = sums.clone(), weight.clone()

    @property
    def modules(self) -> int | None:
        """The number of modules; None before the first step."""
        return None if self._sums is None else len(self._sums)
