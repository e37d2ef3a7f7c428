"""Made-up factors, gradients and averages for the allocation kernels, and who is tested on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from peftkernels.backends.registry import allocation_names, kernels_for
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import FactorLayout

CPU = torch.device("cpu")
BETA1, BETA2 = 0.85, 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Triton's kernels add in another order, in float32 alone, and are slow where they are interpreted: they have tests of
# their own.
ON_THE_CPU = tuple(name for name in allocation_names() if name != "triton")
PARTICULAR_RANKS = (0, 1, 12, 33)


@dataclass
class Problem:
    """Layers (r, K, N), their factors and gradients, and averages that have seen some steps."""

    layout: FactorLayout
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    sensitivity: Tensor
    uncertainty: Tensor

    def update(self, kernels: AllocationKernels, skip: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """finite, Ī and Ū after an update of copies."""
        sensitivity, uncertainty = self.sensitivity.clone(), self.uncertainty.clone()
        finite = kernels.update_averages(
            self.layout, self.parameters, self.gradients, sensitivity, uncertainty, BETA1, BETA2, skip
        )
        return finite, sensitivity, uncertainty


def lay_out(tensor: Tensor, how: str) -> Tensor:
    """The same values in other strides."""
    if how == "transposed":
        return tensor.t().contiguous().t()
    if how == "strided":
        wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1] + 1, dtype=tensor.dtype)
        wide[:, 1::2] = tensor
        return wide[:, 1::2]
    return tensor


def make_problem(
    layers: list[tuple[int, int, int]],
    seed: int = 0,
    parameter_dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    missing: int = 0,
    how: str = "contiguous",
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    layout = FactorLayout.of(layers)

    def draw(shape: tuple[int, int], to: torch.dtype) -> Tensor:
        # Magnitudes over many powers of two, so that sums round.
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out((values * torch.exp2(torch.randn(shape, generator=generator) * 3)).to(to), how)

    parameters = [draw(shape, parameter_dtype) for shape in layout.shapes]
    gradients: list[Tensor | None] = [draw(shape, gradient_dtype or parameter_dtype) for shape in layout.shapes]
    for index in torch.randperm(len(gradients), generator=generator)[:missing].tolist():
        gradients[index] = None
    averages = []
    for _ in range(2):
        average = torch.zeros(layout.numel, dtype=dtype)
        for view in layout.views(average):
            view.copy_(draw(tuple(view.shape), dtype).abs())
        averages.append(average)
    return Problem(layout, parameters, gradients, *averages)


extents = st.sampled_from((1, 3, 7, 16, 31, 65, 129, 1030))
layer_lists = st.lists(
    st.tuples(st.one_of(st.sampled_from(PARTICULAR_RANKS), st.integers(0, 20)), extents, extents),
    min_size=1,
    max_size=4,
)
problems = st.builds(
    make_problem,
    layer_lists,
    seed=st.integers(0, 2**31),
    parameter_dtype=st.sampled_from(DTYPES),
    gradient_dtype=st.sampled_from((None, torch.float32, torch.bfloat16)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    missing=st.integers(0, 2),
    how=st.sampled_from(("contiguous", "transposed", "strided")),
)
drawn = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def served(impl: str) -> AllocationKernels:
    """The named kernels, or a skip with the reason."""
    try:
        return kernels_for(CPU, torch.float32, impl)
    except RuntimeError as error:
        pytest.skip(str(error))
