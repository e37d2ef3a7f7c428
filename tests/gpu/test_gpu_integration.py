"""torch.compile, autocast, checkpointing and saved memory with the Triton kernels on the device they are made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, Call, make_call, run
from support.implementations import served
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkernels import explain, lora_linear
from peftkernels.ops.schemas import rank_dtype

SIZES: dict[str, dict[str, Any]] = {
    "small": {"leading": (2, 9), "n": 48, "k": 80},
    "large": {"leading": (3, 259), "n": 1040, "k": 528},
}
in_every_size = pytest.mark.parametrize("size", [pytest.param("small"), pytest.param("large", marks=pytest.mark.gpu)])
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _low() -> str:
    """bf16, or fp16 where bf16 is not computed."""
    return served("triton", ("bf16", "fp16"))[0]


def _call(seed: int, size: str, device: torch.device, **changes: Any) -> Call:
    arguments = {"r": 21, "plan": True, "dtype": f"{_low()}-fp32_factors", "scaling": "tensor", **changes}
    return make_call(seed, **SIZES[size], **arguments).on(device)


def _leaves(call: Call) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_(name in TRAINABLE) for name, value in call.tensors().items()}


def _apply(leaves: dict[str, Tensor], call: Call, impl: str = "triton", **changes: Any) -> Tensor:
    keywords = {**call.optional, "bias": leaves["bias"], "gate": leaves["gate"], **changes}
    return lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)


def _assert_gradients(leaves: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in TRAINABLE:
        gradient = leaves[name].grad
        assert gradient is not None and torch.equal(gradient, expected[name]), f"∂{name}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_program_for_all_masks(backend: str, device: torch.device, seed: int) -> None:
    """Bits of the uncompiled call, and no second program when the plan, the gate or the scaling change."""
    call = _call(seed, "large", device, dropout_p=0.2)
    plan, gate = call.rank_plan, call.gate
    assert plan is not None and gate is not None
    function = torch.compile(
        lambda leaves, scaling: _apply(leaves, call, scaling=scaling), fullgraph=True, backend=backend
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            plan.update_(torch.roll(plan.state, step))
            now = call.replace(scaling=torch.tensor(step - 1.5, device=device), gate=gate * (step + 1))
            leaves = _leaves(now)
            y = function(leaves, now.scaling)
            y.backward(call.grad_y)
            expected = run(now, "triton")
            assert torch.equal(y.detach(), expected.y.to(device))
            _assert_gradients(leaves, expected.gradients)


@in_every_size
def test_autocast(size: str, device: torch.device, seed: int) -> None:
    """float32 arguments are cast to the autocast dtype, with the bits of casting by hand."""
    low = TORCH_DTYPES[_low()]
    call = _call(seed, size, device, dtype="fp32")
    by_hand = {name: getattr(call, name).to(low) for name in ("x", "weight", "bias", "grad_y")}
    expected = run(call.replace(**by_hand), "triton")
    leaves = _leaves(call)
    with torch.autocast(device.type, low):
        y = _apply(leaves, call)
    y.backward(call.grad_y.to(low))
    assert torch.equal(y.detach(), expected.y)
    for name in TRAINABLE:
        gradient, other = leaves[name].grad, expected.gradients[name]
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.to(other.dtype), other), f"∂{name}"


@in_every_size
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing(size: str, use_reentrant: bool, device: torch.device, seed: int) -> None:
    """The seed that is drawn again when the forward pass is recomputed is the one that made y."""
    call = _call(seed, size, device, dropout_p=0.5)
    results = []
    for recompute in (False, True):
        torch.manual_seed(seed)
        leaves = _leaves(call)

        def layer(x: Tensor, leaves: dict[str, Tensor] = leaves) -> Tensor:
            return _apply({**leaves, "x": x}, call, dropout_seed=None)

        y = checkpoint(layer, leaves["x"], use_reentrant=use_reentrant) if recompute else layer(leaves["x"])
        torch.rand(100, device=device)
        y.backward(call.grad_y)
        results.append([y.detach(), *(leaves[name].grad for name in TRAINABLE)])
    for name, one, other in zip(("y", *TRAINABLE), *results, strict=True):
        assert torch.equal(one, other), name


@in_every_size
def test_what_is_kept_for_backward(size: str, device: torch.device, seed: int) -> None:
    """S and a seed; x and the parameters are the caller's own."""
    call = _call(seed, size, device, dropout_p=0.1)
    leaves = _leaves(call)
    plan = call.rank_plan
    assert plan is not None and isinstance(call.scaling, Tensor)
    given = [*leaves.values(), plan.state, plan.order, plan.counts, call.scaling]
    owned = {value.untyped_storage().data_ptr() for value in given}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        _apply(leaves, call)
    bytes_kept = [value.untyped_storage().nbytes() for place, value in kept.items() if place not in owned]
    rows = call.x.shape[:-1].numel()
    assert sorted(bytes_kept) == [8, rows * call.r * rank_dtype(call.x.dtype).itemsize]


@pytest.mark.gpu
def test_forward_takes_little_memory_beside_its_results(device: torch.device, seed: int) -> None:
    """At the peak, less than a tenth of y beside y and S: x is neither cast nor dropped into a copy."""
    call = make_call(seed, leading=(8192,), n=4096, k=4096, r=16, dropout_p=0.1, dtype="bf16-fp32_factors").on(device)
    leaves = _leaves(call)
    _apply(leaves, call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = _apply(leaves, call)
    taken = torch.cuda.max_memory_allocated(device) - before
    size = y.untyped_storage().nbytes()
    shrink = 8192 * 16 * 2
    # A bit for each element of x is what the kernels may keep of the mask while they run.
    bits = 8192 * 4096 // 8
    assert taken <= size + shrink + bits + size // 10, f"{taken} bytes for y of {size}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "bf16-fp32_factors", "fp16", "fp32"])
def test_auto_takes_the_triton_kernels(dtype: str, device: torch.device, seed: int) -> None:
    call = make_call(seed, dtype=dtype, **SIZES["large"]).on(device)
    explanation = explain(call.x, call.weight, call.lora_A, call.lora_B, **call.optional)
    assert explanation.chosen == "triton", str(explanation)
    automatic = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, **call.optional)
    assert torch.equal(automatic, run(call, "triton").y)
