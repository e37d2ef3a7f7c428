"""The public operator: argument checks, the choice of implementation, and one autograd boundary per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from peftkernels._autocast import autocast_dtype
from peftkernels.backends import registry
from peftkernels.functional.checks import adapter_of, check_call
from peftkernels.functional.function import LoraLinearFunction, forward_of
from peftkernels.ops import composition
from peftkernels.ops.call import Call, named_tensors
from peftkernels.ops.rank_plan import RankPlan
from peftkernels.ops.weights import FrozenWeight, Weight

_SEED_END = 2**63 - 1
_FORWARD_MODE = "forward-mode differentiation"


def _transform(call: Call) -> str | None:
    """What is at work on a call, where it is something that only operations of torch follow, else None."""
    if is_dynamo_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for _, tensor in named_tensors(call)
    ):
        return _FORWARD_MODE
    return None


def _leave_to_python(*arguments: Any) -> Tensor | None:
    """Stands for the C++ entry where there is none."""
    return None


def _load_direct_call(*arguments: Any) -> Tensor | None:
    """Stands for the C++ entry until the first call that may need the C++ kernels, which are not loaded before."""
    global _direct_call
    if arguments[-1] not in ("auto", "cpu"):
        return None
    _direct_call = registry.direct_call(composition.second_derivatives) or _leave_to_python
    return _direct_call(*arguments)


# Serves plain calls on the C++ kernels without the Python code below, and answers None to all others.
_direct_call = _load_direct_call


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    rank_plan: RankPlan | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    shrink: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """A frozen linear layer plus a gated low-rank adapter whose ranks can be masked, in one operator.

        y = x·Wᵀ + bias + scaling · ((drop(x)·Aᵀ) ⊙ ĝ)·Bᵀ,   ĝ_i = gate_i where rank i is ACTIVE, else 0

    Any subset of x, weight, lora_A, lora_B, bias and gate may require grad; gradients come in each parameter's dtype
    and nothing else is computed. Saved for backward: x, S = drop(x)·Aᵀ (M, r), and the parameters themselves. Sums are
    float32 (float64 for float64).

    Gradients can be differentiated again (create_graph), and with "auto" the transforms of torch.func and forward-mode
    differentiation apply: these derivatives are operations of torch, on every backend. A PROBE rank's factors must be
    finite there.

    Where x is float16, all that has one number per rank is float32: the factors, S, H = G·B, and both times gate and
    scaling. In float16 they would end at 65504 and at 6e-8: a young B would leave A without a gradient. Where x is
    bfloat16, which reaches as far as float32, they are bfloat16.

    Args:
        x: (..., K), float32, bfloat16, float16, or float64 (float64 on "reference" and "eager" only).
        weight: W (N, K), frozen, in x's dtype (under autocast any autocast dtype): a tensor, or a `FrozenWeight`.
        lora_A: A (r, K), any float dtype; cast to x's dtype, or to float32 where that is float16.
        lora_B: B (N, r), lora_A's dtype.
        bias: (N,), weight's dtype.
        gate: (r,) or (r, 1), any float dtype; None means ones.
        rank_plan: which ranks are ACTIVE, PROBE (contribute nothing, receive the gate's gradient) or DEAD (nothing at
            all); None means every rank is ACTIVE.
        scaling: a float, or a 0-dim floating-point tensor on x's device, which the host never reads; torch.compile
            makes a new program for another float, not for another value of the tensor.
        dropout_p: in [0, 1]; drops elements of the adapter's input, never of the frozen product's.
        dropout_seed: an int or a 0-dim int64 tensor: the same seed gives the same mask on every backend, and the
            backward pass recomputes it; drawn from torch's generator when None and dropout_p > 0.
        shrink: (M, r), S = x·Aᵀ where the caller has it, as `shared_shrink` makes it: a backend reads it or makes its
            own; refused beside dropout_p > 0.
        impl: "auto" (the fastest that can serve; see `explain`), or a backend by name: "reference", "eager", "cpu",
            "triton", "cuda", or one that was registered. A backend that was named is never replaced by another.

    Returns:
        y (..., N) in x's dtype, or in the autocast dtype under autocast.

    Raises:
        TypeError: an argument of the wrong type or dtype, before any kernel runs.
        ValueError: an argument of the wrong shape, device or range, or an unknown `impl`, before any kernel runs.
        RuntimeError: a backend that was named cannot serve the call.

    Source: LoRA (arXiv 2106.09685), AdaLoRA's gates and masks (arXiv 2303.10512), Philox4x32-10 (Salmon et al. 2011).
    """
    if not is_dynamo_compiling():
        y = _direct_call(
            x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl
        )
        if y is not None:
            return y
    adapter = adapter_of(lora_A, lora_B, gate, rank_plan, scaling, dropout_p, dropout_seed)
    return run(Call(x, weight, adapter, bias, shrink), impl)


def run(call: Call, impl: str) -> Tensor:
    """`lora_linear` from its checks on."""
    call = _in_dtype_of_computation(call)
    chosen = registry.choose(impl, call)
    call = _seeded(call)
    source, weight = None, call.weight
    if isinstance(weight, FrozenWeight):
        source, weight = weight, weight.materialize()
    adapter, gate, bias = call.adapter, call.adapter.gate, call.bias
    saves = recorded = False
    if torch.is_grad_enabled():
        saves = adapter.lora_B.requires_grad or (gate is not None and gate.requires_grad)
        recorded = (
            saves
            or call.x.requires_grad
            or weight.requires_grad
            or adapter.lora_A.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    forward = call.forward(weight, saves)
    transform = _transform(call)
    if transform is not None:
        if unserved := call.later_arguments() - composition.SERVES:
            raise RuntimeError(f"{', '.join(sorted(unserved))}: found beside {transform}, where it is not served")
        if impl == "auto" or not registry.backend(chosen).compiled:
            return composition.forward(forward)[0]
        if recorded or transform == _FORWARD_MODE:
            raise RuntimeError(
                f"impl={impl!r} cannot serve this call: it is differentiated by {transform}, which kernels do not "
                "follow; impl='auto' runs it as operations of torch"
            )
    if not recorded:
        return forward_of(chosen, forward)[0]
    return LoraLinearFunction.record(*forward, chosen, source)[0]


def _in_dtype_of_computation(call: Call) -> Call:
    """The call, checked, with x in the dtype that it is computed in."""
    check_call(call)
    x = call.x
    dtype = autocast_dtype(x.dtype, x.device.type)
    return call if dtype is x.dtype else call._replace(x=x.to(dtype))


def _seeded(call: Call) -> Call:
    """The call with a seed as a tensor where its adapter drops anything, else without."""
    adapter, device = call.adapter, call.x.device
    seed = adapter.dropout_seed
    if adapter.dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(_SEED_END, (), dtype=torch.int64, device=device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    return call if seed is adapter.dropout_seed else call._replace(adapter=adapter._replace(dropout_seed=seed))


def explain(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    rank_plan: RankPlan | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    shrink: Tensor | None = None,
) -> registry.Explanation:
    """Say which backend `lora_linear` takes with the same arguments and `impl="auto"`, and why no faster one.

    Under a transform of torch.func and in forward-mode differentiation that is "composition": operations of torch.
    Nothing is computed. The arguments are those of `lora_linear`, which says more of them.

    Args:
        x: (..., K).
        weight: W (N, K).
        lora_A: A (r, K).
        lora_B: B (N, r).
        bias: (N,), or None.
        gate: (r,) or (r, 1), or None.
        rank_plan: which ranks are ACTIVE, PROBE or DEAD.
        scaling: a float, or a 0-dim tensor.
        dropout_p: in [0, 1].
        dropout_seed: an int, a 0-dim int64 tensor, or None.
        shrink: (M, r), or None.

    Returns:
        The choice with its reasons.

    Raises:
        TypeError: where `lora_linear` raises it.
        ValueError: where `lora_linear` raises it.
    """
    adapter = adapter_of(lora_A, lora_B, gate, rank_plan, scaling, dropout_p, dropout_seed)
    call = _in_dtype_of_computation(Call(x, weight, adapter, bias, shrink))
    return registry.explain_choice(call, _transform(call))
