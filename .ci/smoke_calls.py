"""One call of each operator and one step of an allocator, in the environment that smoke.py makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

import peftkernels
from peftkernels.allocation import AdaLoraAllocator
from peftkernels.nn import AdaLoRALinear

LIBRARIES = ("accelerate", "matplotlib", "numpy", "optuna", "peft", "pytest", "rich", "safetensors", "transformers")


def operators() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 40, requires_grad=True), torch.randn(32, 40)
    lora_A, lora_B = (torch.randn(*shape, requires_grad=True) for shape in ((4, 40), (32, 4)))
    trained = (x, lora_A, lora_B)
    print(peftkernels.explain(x, weight, lora_A, lora_B, scaling=0.5))
    y = peftkernels.lora_linear(x, weight, lora_A, lora_B, scaling=0.5)
    plain = x @ weight.T + 0.5 * (x @ lora_A.T) @ lora_B.T
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(y)
    for found, expected in zip(
        torch.autograd.grad(y, trained, upstream), torch.autograd.grad(plain, trained, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (shrink,) = peftkernels.shared_shrink(x, [lora_A])
    torch.testing.assert_close(shrink, x @ lora_A.T, rtol=1e-4, atol=1e-4)
    shared = peftkernels.lora_linear(x, weight, lora_A, lora_B, scaling=0.5, shrink=shrink)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)


def allocation() -> None:
    layers = [AdaLoRALinear(nn.Linear(16, 24), r=6), AdaLoRALinear(nn.Linear(24, 8), r=6)]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    for layer in layers:
        nn.init.normal_(layer.lora_E)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = AdaLoraAllocator(model, target_r=2, total_step=3, exact_budget=True)
    allocator.attach(optimizer)
    loss = model(torch.randn(5, 16)).square().mean() + allocator.regularization()
    loss.backward()
    optimizer.step()
    kept = sum(int(layer.rank_counts[0]) for layer in layers)
    print(f"one step of AdaLoRA: {kept} of 12 ranks kept")
    assert kept == allocator.budget(1) < 12


def nothing_else() -> None:
    """What was imported lies in this environment or is Python's own, and there is nothing beside it."""
    there = [name for name in ("bench", "demo", *LIBRARIES) if importlib.util.find_spec(name) is not None]
    assert not there, there
    homes = [Path(sys.prefix), Path(sys.base_prefix)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name not in ("__main__", "__mp_main__") and isinstance(file, str) and Path(file).is_absolute():
            assert any(home in Path(file).parents for home in homes), (name, file)
    print(f"imported from {Path(peftkernels.__file__).parent}")


if __name__ == "__main__":
    operators()
    allocation()
    nothing_else()
