"""A small model with adapters for HF peft's files, and the way back through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkernels import RankState

WIDTH = 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PATHS = [f"blocks.{index}.{name}" for index in range(2) for name in ("query", "value")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, 24)
        self.out = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.query(x)) + self.out(torch.tanh(self.value(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base_model() -> Net:
    """A model without adapters, the same every time."""
    torch.manual_seed(0)
    return Net()


def adapted_model(kind: type, paths: list[str] = PATHS, **arguments: Any) -> Net:
    """A base model with adapters that contribute, and a head that training has changed."""
    model = base_model()
    torch.manual_seed(1)
    for index, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        own = {key: value[index] if isinstance(value, list) else value for key, value in arguments.items()}
        layer = kind.from_linear(model.get_submodule(path), **{"r": 6, "lora_alpha": 9, **own})
        for factor in layer.parameters():
            if factor.requires_grad:
                nn.init.normal_(factor, std=0.3)
        setattr(model.get_submodule(parent), name, layer)
    return model.eval()


def prune(model: Net, *kept: list[int]) -> dict[str, list[bool]]:
    """Mask ranks as an allocator does: gates zero, states PROBE."""
    pattern = {}
    for path, ranks in zip(PATHS, kept, strict=True):
        layer = model.get_submodule(path)
        keep = torch.zeros(layer.r, dtype=torch.bool)
        keep[ranks] = True
        with torch.no_grad():
            layer.lora_E[~keep] = 0
        layer.rank_plan.update_(torch.where(keep, int(RankState.ACTIVE), int(RankState.PROBE)).to(torch.uint8))
        pattern[path] = keep.tolist()
    return pattern


def change_head(model: Net) -> None:
    """Write other values into the head, as training does."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()


def through_peft(directory: Path) -> nn.Module:
    """The base model with the adapter as peft loads it."""
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    return peft.PeftModel.from_pretrained(base_model(), str(directory)).eval()


def config_of(directory: Path) -> dict[str, Any]:
    """The configuration that was saved."""
    return json.loads((directory / "adapter_config.json").read_text())
