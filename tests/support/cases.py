"""Random calls of `lora_linear` at realistic scales, rebuilt exactly from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftkernels import RankPlan, RankState, lora_linear
from peftkernels.functional.checks import adapter_of
from peftkernels.ops import call as records
from peftkernels.ops.call import Forward
from support.devices import FROZEN_WEIGHTS, device_of, moved, moved_plan

GRADIENTS = ("x", "weight", "lora_A", "lora_B", "bias", "gate")
TRAINABLE = ("x", "lora_A", "lora_B", "bias", "gate")

# name: (dtype of x, weight and bias, dtype of the factors and the gate)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32_factors": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32_factors": (torch.float16, torch.float32),
    "fp32-bf16_factors": (torch.float32, torch.bfloat16),
    "fp32-fp64_factors": (torch.float32, torch.float64),
}


@dataclass
class Call:
    """The arguments of one call and the gradient that comes back into it."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    gate: Tensor | None
    grad_y: Tensor
    rank_plan: RankPlan | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    shrink: Tensor | None = None
    label: str = ""

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def state(self) -> Tensor:
        if self.rank_plan is None:
            return torch.full((self.r,), int(RankState.ACTIVE), dtype=torch.uint8, device=self.x.device)
        return self.rank_plan.state

    @property
    def optional(self) -> dict[str, Any]:
        return {
            "bias": self.bias,
            "gate": self.gate,
            "rank_plan": self.rank_plan,
            "scaling": self.scaling,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.dropout_seed,
            "shrink": self.shrink,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument that this call has, by name."""
        named = {name: getattr(self, name) for name in GRADIENTS}
        return {name: value for name, value in named.items() if value is not None}

    def request(self) -> records.Call:
        """The call as backends are asked about it."""
        optional = {name: value for name, value in self.optional.items() if name not in ("bias", "shrink")}
        adapter = adapter_of(self.lora_A, self.lora_B, **optional)
        return records.Call(self.x, self.weight, adapter, self.bias, self.shrink)

    def record(self) -> Forward:
        """The call as operators take it; a seed is a tensor here."""
        return self.request().forward(self.weight, True)

    def replace(self, **changes: Any) -> Call:
        return replace(self, **changes)

    def on(self, device: torch.device) -> Call:
        """The same call with every tensor on `device`; the call itself where they are there already."""
        if self.x.device == device:
            return self
        named = {**self.tensors(), "grad_y": self.grad_y, **self.optional}
        changes = {name: moved(value, device) for name, value in named.items() if isinstance(value, Tensor)}
        plan = None if self.rank_plan is None else moved_plan(self.rank_plan, device)
        return self.replace(**changes, rank_plan=plan)


@dataclass
class Outcome:
    """y and the gradients that were asked for."""

    y: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        return {"y": self.y, **{f"∂{name}": gradient for name, gradient in self.gradients.items()}}

    def on(self, device: torch.device) -> Outcome:
        gradients = {name: gradient.to(device) for name, gradient in self.gradients.items()}
        return Outcome(self.y.to(device), gradients)


def run(call: Call, impl: str, needs: tuple[str, ...] | None = None) -> Outcome:
    """One forward and backward through the public function, on the implementation's device; results come back.

    `needs` are the arguments that require grad (default: all that the call has and `impl` trains). Anything else must
    stay without a gradient.
    """
    if needs is None:
        needs = TRAINABLE if impl in FROZEN_WEIGHTS else GRADIENTS
    at_home = call.x.device
    call = call.on(device_of(impl))
    leaves = {name: value.detach().requires_grad_(name in needs) for name, value in call.tensors().items()}
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate")}
    y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)
    asked = [name for name in GRADIENTS if name in needs and name in leaves]
    if asked:
        y.backward(call.grad_y)
    gradients = {}
    for name, leaf in leaves.items():
        if name not in asked:
            assert leaf.grad is None, f"{name} has a gradient that nobody asked for ({call.label})"
            continue
        assert leaf.grad is not None, f"{name} has no gradient ({call.label})"
        assert leaf.grad.dtype == leaf.dtype, f"∂{name} is {leaf.grad.dtype}, {name} is {leaf.dtype} ({call.label})"
        assert leaf.grad.shape == leaf.shape, f"∂{name} has shape {tuple(leaf.grad.shape)} ({call.label})"
        gradients[name] = leaf.grad
    assert y.dtype == call.x.dtype, f"y is {y.dtype}, x is {call.x.dtype} ({call.label})"
    assert y.shape == (*call.x.shape[:-1], call.weight.shape[0]), f"y has shape {tuple(y.shape)} ({call.label})"
    return Outcome(y.detach(), gradients).on(at_home)


def mixed_plan(r: int, generator: torch.Generator) -> RankPlan:
    """Random states; from three ranks on, each state occurs."""
    state = torch.randint(3, (r,), generator=generator, dtype=torch.uint8, device="cpu")
    state[:3] = torch.tensor([2, 0, 1], dtype=torch.uint8, device="cpu")[:r]
    return RankPlan.from_state(state[torch.randperm(r, generator=generator, device="cpu")])


def make_call(
    seed: int,
    *,
    leading: tuple[int, ...] = (7,),
    n: int = 33,
    k: int = 29,
    r: int = 5,
    dtype: str = "fp32",
    bias: bool = True,
    gate: bool = True,
    plan: bool = False,
    scaling: float | str = 1.7,
    dropout_p: float = 0.0,
) -> Call:
    """x and G ~ N(0, 1), W and A ~ N(0, 1/K), B ~ N(0, 1/r), gates around 1: every term of y is of order 1.

    `scaling="tensor"` passes 1.7 as a 0-dim tensor. A seed gives the same numbers on every device; the call lies on
    torch's default device.
    """
    x_dtype, factor_dtype = DTYPES[dtype]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = x_dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * std).to(dtype)

    depth_std = 1 / math.sqrt(max(k, 1))
    label = f"seed={seed} x={(*leading, k)} N={n} r={r} dtype={dtype} plan={plan} p={dropout_p}"
    return Call(
        x=normal(*leading, k),
        weight=normal(n, k, std=depth_std),
        lora_A=normal(r, k, std=depth_std, dtype=factor_dtype),
        lora_B=normal(n, r, std=1 / math.sqrt(max(r, 1)), dtype=factor_dtype),
        bias=normal(n) if bias else None,
        gate=(1 + normal(r, std=0.5, dtype=torch.float64)).to(factor_dtype) if gate else None,
        grad_y=normal(*leading, n),
        rank_plan=mixed_plan(r, generator) if plan else None,
        scaling=torch.tensor(1.7, dtype=torch.float32, device="cpu") if scaling == "tensor" else float(scaling),
        dropout_p=dropout_p,
        dropout_seed=seed * 7919 + 1 if dropout_p > 0 else None,
        label=label,
    ).on(torch.get_default_device())
