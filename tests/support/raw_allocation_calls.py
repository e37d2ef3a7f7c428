"""Arguments of the raw operators of rank allocation by name, and the order they come in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkernels import RankPlan
from peftkernels.ops import allocation  # noqa: F401  (declares the operators)

# r, K, N of two layers
LAYERS = ((3, 5, 4), (2, 6, 7))
SHAPES = [shape for r, k, n in LAYERS for shape in ((r, k), (n, r), (r, 1))]
NAMES = {
    "averages": (
        "parameters", "gradients", "table", "sensitivity", "uncertainty", "beta1", "beta2", "skip", "with_scores",
    ),
    "scores": ("table", "sensitivity", "uncertainty"),
    "mask": ("keep", "mask_now", "gates", "states", "orders", "counts", "masked_state"),
    "orthogonality": ("lora_A", "lora_B", "weight", "keep", "add_to", "scale", "gradients"),
}  # fmt: skip


def valid(operator: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    numel = sum(rows * columns for rows, columns in SHAPES)
    if operator in ("averages", "scores"):
        rows, at = [], 0
        for r, c in SHAPES:
            rows.append((at, r, c))
            at += r * c
        averages = {"table": torch.tensor(rows), "sensitivity": normal(numel), "uncertainty": normal(numel)}
        if operator == "scores":
            return averages
        factors = {
            "parameters": [normal(*shape) for shape in SHAPES],
            "gradients": [normal(*shape) for shape in SHAPES],
        }
        return {**factors, **averages, "beta1": 0.85, "beta2": 0.8, "skip": torch.tensor(False), "with_scores": True}
    if operator == "mask":
        plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool)) for r, _, _ in LAYERS]
        return {
            "keep": torch.tensor([True, False, True, False, True]),
            "mask_now": torch.tensor(True),
            "gates": [normal(r, 1) for r, _, _ in LAYERS],
            "states": [plan.state for plan in plans],
            "orders": [plan.order for plan in plans],
            "counts": [plan.counts for plan in plans],
            "masked_state": 1,
        }
    return {
        "lora_A": [normal(r, k) for r, k, _ in LAYERS],
        "lora_B": [normal(n, r) for r, _, n in LAYERS],
        "weight": 0.5,
        "keep": [torch.ones(r, dtype=torch.bool) for r, _, _ in LAYERS],
        "add_to": [normal(r, k) for r, k, _ in LAYERS] + [normal(n, r) for r, _, n in LAYERS],
        "scale": 2.0,
        "gradients": False,
    }


def call(operator: str, arguments: dict[str, Any]) -> Any:
    overload = getattr(torch.ops.peftkernels, f"allocation_{operator}").cpu
    return overload(*(arguments[name] for name in NAMES[operator]))
