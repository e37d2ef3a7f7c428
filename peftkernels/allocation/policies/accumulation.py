"""How many micro-batches to accumulate: the gradient's noise scale, from the gates' gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.layers.gated import find_gated_layers
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.state_checks import check_finite, check_names, check_not_negative, check_tensor


class NoiseScale:
    """The simple noise scale B = tr(Σ)/|G|², in rows, of the gates' gradients (McCandlish et al., arXiv 1812.06162).

        noise = NoiseScale(model)
        allocator.add_callback(noise)                # or noise() after every optimizer step
        while training:
            count = noise.accumulation(most=16)
            for rows in micro_batches(count):
                (loss(model, rows) / count).backward()
                noise.micro_batch(len(rows), scale=1 / count)
            optimizer.step()
            optimizer.zero_grad()

    G is the true gradient and Σ the covariance of the gradient of one row. From k >= 2 micro-batches of b rows with
    gradients g_m and their mean g, without bias (appendix A.1 of the paper, with batches of b and of k·b rows):

        |G|² ≈ (k·|g|² - mean_m |g_m|²)/(k - 1)        tr Σ ≈ b·(mean_m |g_m|² - |g|²)·k/(k - 1)

    Both are smoothed by beta over steps before they are divided. At a batch of B rows, twice as many steps and twice as
    many rows are needed as at the best for either; far below it a larger batch saves steps nearly for free, far above
    it rows are wasted. The gates stand for all parameters: one number for each rank, which the backward pass has
    anyway. What they say is about the directions that the ranks have now; DEAD ones say nothing. On an accelerator only
    `value` and `accumulation` synchronise with the device.

    Steps with one micro-batch, with unequal ones, or with gradients that are not finite are left out.

    Args:
        model: A module with AdaLoRALinear layers, or a mapping of names to such layers.
        beta: Smoothing of both estimates, between 0 and 1.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    def __init__(self, model: nn.Module | Mapping[str, Any], beta: float = 0.95) -> None:
        check_smoothing("beta", beta)
        self.beta = beta
        self._gates = [layer.lora_E for layer in find_gated_layers(model).values()]
        # Running means of |G|² and tr Σ, and the weight of what they have seen.
        self._means = torch.zeros(3, dtype=torch.float64)
        self._rows: list[int] = []
        self._last_rows = 0
        # Of the micro-batches since the last step: gradients as accumulated, their sum, and Σ|g_m|².
        self._total: Tensor | None = None
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def micro_batch(self, rows: int, scale: float = 1.0) -> None:
        """Take in the gradients of a micro-batch, after its `backward()`.

        Args:
            rows: What the loss was a mean over, samples or tokens: the noise scale is counted in the same.
            scale: What the loss was multiplied by before `backward()`, such as 1/count, or a loss scale.
        """
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"rows: found {rows!r}, expected an int of at least 1")
        if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: found {scale!r}, expected a finite number above 0")
        with torch.no_grad():
            total = torch.cat(
                [
                    (torch.zeros_like(gate) if gate.grad is None else gate.grad).reshape(-1).double()
                    for gate in self._gates
                ]
            )
            gradient = (total if self._total is None else total - self._total) / scale
            square = gradient.square().sum()
            self._total = total
            self._sum = gradient if self._sum is None else self._sum + gradient
            self._squares = square if self._squares is None else self._squares + square
        self._rows.append(rows)

    def __call__(self, allocator: BudgetAllocator | None = None) -> None:
        """Take note that an optimizer step was made of the micro-batches since the last one."""
        count, even = len(self._rows), len(set(self._rows)) == 1
        if count:
            self._last_rows = self._rows[0]
        if count > 1 and even and self._sum is not None and self._squares is not None:
            mean_square = self._squares / count
            square_of_mean = (self._sum / count).square().sum()
            gradient = (count * square_of_mean - mean_square) / (count - 1)
            noise = self._rows[0] * (mean_square - square_of_mean) * count / (count - 1)
            seen = torch.stack([gradient, noise, torch.ones_like(noise)])
            self._means = self._means.to(seen.device)
            smoothed = self.beta * self._means + (1 - self.beta) * seen
            self._means = torch.where(torch.isfinite(seen).all(), smoothed, self._means)
        self._forget()

    @property
    def value(self) -> float | None:
        """B in rows; None before the first step that counts, infinite where the gradient drowns in noise."""
        gradient, noise, weight = self._means.tolist()
        if weight == 0:
            return None
        return max(0.0, noise) / gradient if gradient > 0 else math.inf

    def accumulation(self, most: int, least: int = 2) -> int:
        """Return the number of micro-batches whose rows together come nearest to the noise scale.

        It is `least` before the first estimate. With one micro-batch a step nothing can be estimated: `least=1` stops
        the estimate where it proposes one.

        Args:
            most: The highest number to return.
            least: The lowest one.

        Raises:
            ValueError: Unless 1 <= least <= most.
        """
        if not 1 <= least <= most:
            raise ValueError(f"least, most: found {least} and {most}, expected 1 <= least <= most")
        value = self.value
        if value is None:
            return least
        return most if math.isinf(value) else min(most, max(least, round(value / self._last_rows)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs, taken between two steps."""
        return {"means": self._means.clone(), "rows": torch.tensor(self._last_rows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, for anything else.
        """
        check_names(state, ("means", "rows"))
        means = check_finite(check_tensor(state, "means", self._means.shape, self._means.dtype), "means")
        rows = check_not_negative(check_tensor(state, "rows", torch.Size(()), torch.int64), "rows")
        if not 0 <= means[2] <= 1 + 1e-6:
            # What the estimates are divided by tends to 1 from below; rounding may carry it a little past.
            raise ValueError(f"state['means']: found the weight {float(means[2])}, expected a number from 0 to 1")
        if means[2] > 0 and rows == 0:
            raise ValueError("state['rows']: found 0, expected at least 1 beside an estimate")
        self._means, self._last_rows = means.clone(), int(rows)
        self._forget()

    def _forget(self) -> None:
        self._total = self._sum = self._squares = None
        self._rows.clear()
