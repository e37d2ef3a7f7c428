"""The public operator: argument checks, the choice of implementation, and one autograd boundary per call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from peftkernels._autocast import autocast_dtype
from peftkernels.backends import registry
from peftkernels.functional.checks import check_arguments, plain_number
from peftkernels.ops import composition
from peftkernels.ops.rank_plan import RankPlan

_FORWARD = torch.ops.peftkernels.lora_linear_fwd
_BACKWARD = torch.ops.peftkernels.lora_linear_bwd
_OVERLOADS = {name: (getattr(_FORWARD, name), getattr(_BACKWARD, name)) for name in registry.REGISTERED}
# The functions behind overloads that are written in Python: what runs when nobody watches operators, without the way
# through torch's dispatcher.
_FUNCTIONS = {name: (_OVERLOADS[name], functions) for name, functions in registry.PYTHON_FUNCTIONS.items()}
_PLAIN = (Tensor, torch.nn.Parameter)
# Implementations that are not made of torch's own operators.
_KERNELS = ("cpu", "triton")
_SEED_END = 2**63 - 1
_FORWARD_MODE = "forward-mode differentiation"


def _operator(impl: str, direction: int, *tensors: Tensor | None) -> Callable[..., Any]:
    """What computes: an overload, or the function behind it where no mode, no subclass and no tracer would see it.

    tensors  those that are read as numbers; torch's dispatcher also negates the memory of views that ask for it
    """
    overloads = _OVERLOADS[impl]
    behind = _FUNCTIONS.get(impl)
    if (
        behind is None
        or behind[0] is not overloads
        or is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return overloads[direction]
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return overloads[direction]
    return behind[1][direction]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        given_shrink: Tensor | None,
        impl: str,
        weight_of: Callable[[], Tensor] | None,
    ) -> Tensor:
        _, needs_weight, needs_A, needs_B, _, needs_gate = ctx.needs_input_grad[:6]
        save_shrink = needs_B or needs_gate
        y, shrink = _operator(impl, 0, x, weight, lora_A, lora_B, bias, gate, scaling_tensor, given_shrink)(
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            gate,
            rank_state,
            rank_order,
            rank_counts,
            scaling,
            scaling_tensor,
            dropout_p,
            dropout_seed,
            save_shrink,
            given_shrink,
        )
        if given_shrink is not None:
            shrink = given_shrink
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if weight_of is None else None,
            lora_A,
            lora_B,
            bias,
            shrink if save_shrink else None,
            gate,
            rank_state,
            rank_order,
            rank_counts,
            scaling_tensor,
            dropout_seed,
        )
        ctx.scaling = scaling
        ctx.dropout_p = dropout_p
        ctx.impl = impl
        ctx.weight_of = weight_of
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            shrink,
            gate,
            rank_state,
            rank_order,
            rank_counts,
            scaling_tensor,
            dropout_seed,
        ) = ctx.saved_tensors
        if weight is None:
            weight = ctx.weight_of()
        needs = list(ctx.needs_input_grad[:6])
        # Dynamo traces this with gradients enabled; the compiled graph refuses double backward by itself.
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if differentiable else nullcontext():
            gradients = _operator(ctx.impl, 1, grad_y, x, weight, lora_A, lora_B, shrink, gate, scaling_tensor)(
                grad_y,
                x,
                weight,
                lora_A,
                lora_B,
                bias,
                shrink,
                gate,
                rank_state,
                rank_order,
                rank_counts,
                ctx.scaling,
                scaling_tensor,
                ctx.dropout_p,
                dropout_seed,
                needs,
            )
        asked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        if differentiable:
            scale = ctx.scaling if scaling_tensor is None else scaling_tensor
            at = composition.Constants(rank_state, scale, ctx.dropout_p, dropout_seed)
            asked = list(
                composition.Gradients.apply(
                    at, needs, x is None and needs[0], shrink, bias, grad_y, x, weight, lora_A, lora_B, gate, *asked
                )
            )
        return *asked, None, None, None, None, None, None, None, None, None, None


def _transform(arguments: Iterable[Tensor | None]) -> str | None:
    """What is at work on a call, where it is something that only operations of torch follow, else None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0 and any(
        value is not None and forward_ad.unpack_dual(value).tangent is not None for value in arguments
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
    weight: Tensor,
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

    x             (..., K)  float32, bfloat16, float16, or float64 (float64 on "reference" and "eager" only)
    weight        (N, K)    frozen; x's dtype (under autocast any autocast dtype)
    lora_A        (r, K)    any float dtype; cast to x's dtype, or to float32 where that is float16
    lora_B        (N, r)    lora_A's dtype
    bias          (N,)      weight's dtype
    gate          (r,) or (r, 1), any float dtype; None means ones
    rank_plan     which ranks are ACTIVE, PROBE (contribute nothing, receive the gate's gradient) or DEAD (nothing at
                  all); None means every rank is ACTIVE
    scaling       float, or a 0-dim floating-point tensor on x's device, which the host never reads; torch.compile
                  makes a new program for another float, not for another value of the tensor
    dropout_p     in [0, 1]; drops elements of the adapter's input, never of the frozen product's
    dropout_seed  int or 0-dim int64 tensor: the same seed gives the same mask on every implementation, and the
                  backward pass recomputes it; drawn from torch's generator when None and dropout_p > 0
    shrink        (M, r) S = x·Aᵀ where the caller has it, as `shared_shrink` makes it: an implementation reads it or
                  makes its own; refused beside dropout_p > 0
    impl          "auto" (the fastest that can serve; see `explain`), or by name: "reference", "eager", "cpu",
                  "triton", "cuda"; a named implementation is never replaced by another

    Returns y (..., N) in x's dtype, or in the autocast dtype under autocast. Any subset of x, weight, lora_A, lora_B,
    bias and gate may require grad; gradients come in each parameter's dtype and nothing else is computed. Saved for
    backward: x, S = drop(x)·Aᵀ (M, r), and the parameters themselves. Sums are float32 (float64 for float64).

    Gradients can be differentiated again (create_graph), and with "auto" the transforms of torch.func and forward-mode
    differentiation apply: these derivatives are operations of torch, on every implementation. A PROBE rank's factors
    must be finite there.

    Where x is float16, all that has one number per rank is float32: the factors, S, H = G·B, and both times gate and
    scaling. In float16 they would end at 65504 and at 6e-8: a young B would leave A without a gradient. Where x is
    bfloat16, which reaches as far as float32, they are bfloat16.
    bfloat16, which reaches as far as float32, they are bfloat16.

    Raises TypeError or ValueError, before any kernel runs, for an argument of the wrong type, dtype, shape, device or
    range; RuntimeError when a named `impl` cannot serve.

    Source: LoRA (arXiv 2106.09685), AdaLoRA's gates and masks (arXiv 2303.10512), Philox4x32-10 (Salmon et al. 2011).
    """
    if not is_dynamo_compiling():
        y = _direct_call(
            x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl
        )
        if y is not None:
            return y
    return _call(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl, None)


def _call(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    rank_plan: RankPlan | None,
    scaling: float | Tensor,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    shrink: Tensor | None,
    impl: str,
    weight_of: Callable[[], Tensor] | None,
) -> Tensor:
    """`lora_linear` from its checks on; with ``weight_of``, the weight is not kept for the backward pass."""
    check_arguments(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink)
    scaling, dropout_p, dropout_seed = plain_number(scaling), plain_number(dropout_p), plain_number(dropout_seed, int)
    device = x.device
    dtype = autocast_dtype(x.dtype, device.type)
    if dtype is not x.dtype:
        x = x.to(dtype)
    chosen = registry.choose(impl, x, weight)

    seed: Tensor | None = None
    if dropout_p > 0:
        if dropout_seed is None:
            seed = torch.randint(_SEED_END, (), dtype=torch.int64, device=device)
        elif isinstance(dropout_seed, Tensor):
            seed = dropout_seed
        else:
            seed = torch.full((), dropout_seed, dtype=torch.int64, device=device)
    state, order, counts = (
        (None, None, None) if rank_plan is None else (rank_plan.state, rank_plan.order, rank_plan.counts)
    )
    scaling_tensor = scaling if isinstance(scaling, Tensor) else None
    scaling_value = 1.0 if isinstance(scaling, Tensor) else scaling

    arguments = (x, weight, lora_A, lora_B, bias, gate)
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (gate is not None and gate.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if not is_dynamo_compiling() and (transform := _transform(arguments)) is not None:
        if impl == "auto" or chosen not in _KERNELS:
            return composition.forward(*arguments, composition.Constants(state, scaling, dropout_p, seed))
        if recorded or transform == _FORWARD_MODE:
            raise RuntimeError(
                f"impl={impl!r} cannot serve this call: it is differentiated by {transform}, which kernels do not "
                "follow; impl='auto' runs it as operations of torch"
            )
    if recorded:
        return _LoraLinear.apply(
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            gate,
            state,
            order,
            counts,
            scaling_value,
            scaling_tensor,
            dropout_p,
            seed,
            shrink,
            chosen,
            weight_of,
        )
    return _operator(chosen, 0, x, weight, lora_A, lora_B, bias, gate, scaling_tensor, shrink)(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        gate,
        state,
        order,
        counts,
        scaling_value,
        scaling_tensor,
        dropout_p,
        seed,
        False,
        shrink,
    )[0]


def lora_linear_of(
    weight_of: Callable[[], Tensor],
    x: Tensor,
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
    """`lora_linear` over a frozen weight that exists only while a pass uses it, such as a dequantised one.

    weight_of  makes the weight (N, K), frozen, in x's dtype: called for the forward pass and again for the backward
               pass, the same both times. In between nothing of it is kept
    impl       "auto" takes "eager" on CPUs, where the C++ kernels would pack each weight for a single use

    Everything else, and errors, as for `lora_linear`.
    """
    weight = weight_of()
    if impl == "auto" and x.device.type == "cpu":
        impl = "eager"
    return _call(
        x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl, weight_of
    )


def explain(
    x: Tensor,
    weight: Tensor,
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
    """Which implementation `lora_linear` with the same arguments and `impl="auto"` takes, and why no faster one.

    Arguments and errors as for `lora_linear`; nothing is computed.
    """
    check_arguments(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink)
    x = x.to(autocast_dtype(x.dtype, x.device.type))
    return registry.explain_choice(x, weight)
