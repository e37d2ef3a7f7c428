"""S of several adapters at once, for projections that read the same x."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftkernels._autocast import autocast_dtype
from peftkernels.backends import registry
from peftkernels.functional.checks import check_shared_shrink
from peftkernels.ops.call import Shrink


def shared_shrink(x: Tensor, lora_A: Sequence[Tensor], *, impl: str = "auto") -> tuple[Tensor, ...]:
    """S_j = x·A_jᵀ of several adapters that read the same x, in one pass over it.

    Projections such as q, k and v, or gate and up, take their part as the argument ``shrink`` of `lora_linear`:

        for projection, shrink in zip(projections, shared_shrink(x, [p.lora_A for p in projections])):
            y = lora_linear(x, projection.weight, projection.lora_A, projection.lora_B, shrink=shrink)

    Args:
        x: (..., K), float32, bfloat16, float16, or float64 (float64 on "reference" and "eager" only), without dropout.
        lora_A: one (r_j, K) of each adapter, any float dtype.
        impl: as for `lora_linear`.

    Returns:
        (M, r_j) for each, views of one tensor, in x's dtype, or in the autocast dtype under autocast; in float32 where
        that is float16. They carry no gradient: `lora_linear` gives that of x and of A_j as if it had made S_j.

    Raises:
        TypeError: an argument of the wrong type or dtype, before any kernel runs.
        ValueError: an argument of the wrong shape or device, before any kernel runs.
        RuntimeError: a backend that was named cannot serve the call.
    """
    check_shared_shrink(x, lora_A)
    x = x.detach()
    dtype = autocast_dtype(x.dtype, x.device.type)
    if dtype is not x.dtype:
        x = x.to(dtype)
    factors = [factor.detach() for factor in lora_A]
    call = Shrink(x, factors)
    whole: Tensor = registry.OPERATORS[registry.choose(impl, call)].shrink(*call)
    return whole.split([factor.shape[0] for factor in factors], 1)
