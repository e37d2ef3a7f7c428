"""Arguments of the raw operators by name, the order they come in, and what is wrong with a call of one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkernels import RankPlan
from peftkernels.ops.call import Backward, Forward, Shrink

M, N, K, R = 6, 12, 10, 5
OPERATORS = ("lora_linear_fwd", "lora_linear_bwd", "lora_shrink")
NAMES = {"lora_linear_fwd": Forward._fields, "lora_linear_bwd": Backward._fields, "lora_shrink": Shrink._fields}


def valid(operator: str, seed: int = 0) -> dict[str, Any]:
    """A legal call in which every argument is given that can be, dropout but beside a given S."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    if operator == "lora_shrink":
        return {"x": normal(2, M // 2, K), "lora_A": [normal(R, K), normal(3, K)]}
    plan = RankPlan.from_state(torch.tensor([2, 1, 0, 2, 2], dtype=torch.uint8, device="cpu"))
    arguments: dict[str, Any] = {
        "weight": normal(N, K),
        "lora_A": normal(R, K),
        "lora_B": normal(N, R),
        "bias": normal(N),
        "gate": normal(R, 1),
        "rank_state": plan.state,
        "rank_order": plan.order,
        "rank_counts": plan.counts,
        "scaling": 1.0,
        "scaling_tensor": torch.tensor(1.7, device="cpu"),
        "x": normal(2, M // 2, K),
    }
    if operator == "lora_linear_fwd":
        given = {"dropout_p": 0.0, "dropout_seed": None, "save_shrink": False, "given_shrink": normal(M, R)}
        return {**arguments, **given}
    dropped = {"dropout_p": 0.3, "dropout_seed": torch.tensor(7, device="cpu")}
    needs = [True, False, True, True, True, True]
    return {**arguments, **dropped, "grad_y": normal(2, M // 2, N), "shrink": normal(M, R), "needs": needs}


def call(operator: str, impl: str, arguments: dict[str, Any]) -> Any:
    overload = getattr(getattr(torch.ops.peftkernels, operator), impl)
    return overload(*(arguments[name] for name in NAMES[operator]))
