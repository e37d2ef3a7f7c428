"""Layers, allocators, patched models and files made and thrown away again and again: nothing of them may stay.

After the cycles the process holds as many Python objects, packs and threads as after the first ones, and no more memory
than a few cycles take.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from attacks.attack import Counts
from peftkernels import RankPlan, apply_to_peft, lora_linear, revert
from peftkernels.allocation import AdaLoraAllocator
from peftkernels.backends import cpu
from peftkernels.nn import AdaLoRALinear, LoRALinear

NAME = "lifetimes"
TITLE = "weights, layers, allocators and patched models are made, used, copied, saved and thrown away"
SHORT, LONG = 150, 10_000

# After so many cycles everything that is kept once (compiled code, thread pools, modules) is there.
WARM = 120
# Blocks that the allocator of the C library holds on to: a leak of one weight of a cycle in a hundred is more.
SLACK = 24 * 2**20
WIDTH = 48


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.tanh(self.a(x)))
        return y


def _trained(model: nn.Module) -> None:
    model(torch.randn(3, WIDTH)).square().mean().backward()


def _bare(dice: random.Random) -> None:
    n, k, r = (dice.choice((16, WIDTH, 96)) for _ in range(3))
    weight, lora_A, lora_B = torch.randn(n, k), torch.randn(r, k, requires_grad=True), torch.randn(n, r)
    plan = RankPlan.from_mask(torch.rand(r) < 0.5)
    for rows in (1, 5):
        lora_linear(torch.randn(rows, k, requires_grad=True), weight, lora_A, lora_B, rank_plan=plan).sum().backward()
    # A view's pack, and one of a weight that is freed while its storage lives on.
    lora_linear(torch.randn(2, k), weight[: n // 2], lora_A.detach(), lora_B[: n // 2])


def _layers(dice: random.Random) -> None:
    model = _Net()
    model.a, model.b = LoRALinear(model.a, 4, 8), AdaLoRALinear(model.b, 4)  # type: ignore[assignment]
    _trained(model)
    twin = copy.deepcopy(model)
    _trained(twin)
    model.a.merge()
    model.eval()(torch.randn(2, WIDTH))
    model.a.unmerge()
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    if dice.random() < 0.5:
        # A cycle of references, which only the garbage collector frees.
        model.itself = [model]  # type: ignore[assignment]


def _allocated(dice: random.Random) -> None:
    model = _Net()
    model.a, model.b = AdaLoRALinear(model.a, 6), AdaLoRALinear(model.b, 6)  # type: ignore[assignment]
    allocator = AdaLoraAllocator(model, total_step=8, target_r=2, tinit=1, tfinal=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(4):
        _trained(model)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    allocator.load_state_dict(allocator.state_dict())


def _patched(dice: random.Random) -> None:
    kind = dice.choice(("lora", "dora", "adalora"))
    if kind == "adalora":
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["a", "b"])
    else:
        config = LoraConfig(r=4, target_modules=["a", "b"], use_dora=kind == "dora")
    model = get_peft_model(_Net(), config)
    apply_to_peft(model)
    _trained(model)
    with torch.no_grad():
        model.eval()(torch.randn(2, WIDTH))
    if dice.random() < 0.5:
        revert(model)
        _trained(model)


KINDS: dict[str, Callable[[random.Random], None]] = {
    "weights": _bare,
    "layers": _layers,
    "allocators": _allocated,
    "patched models": _patched,
}


def _held() -> dict[str, int]:
    gc.collect()
    packs = cpu.pack_cache_stats() if cpu.unavailable_reason() is None else {"weights": 0}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "objects": len(gc.get_objects()),
        "weights with packs": int(packs["weights"] or 0),
        "threads": threading.active_count(),
        "resident bytes": resident,
    }


def run(rounds: int, seed: int) -> Counts:
    """``rounds`` cycles of each kind in turn, after some that warm up."""
    counts = Counts()
    dice = random.Random(seed)

    def cycle(count: int) -> None:
        for at in range(count):
            kind = list(KINDS)[at % len(KINDS)]
            KINDS[kind](dice)
            counts.tried[kind] += 1

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cycle(WARM)
        before = _held()
        cycle(rounds)
        after = _held()
    # A few objects come and go by themselves (caches of re, of warnings, of torch); one of each cycle is a leak.
    allowed = {"objects": max(200, rounds // 10), "weights with packs": 0, "threads": 0, "resident bytes": SLACK}
    for name, limit in allowed.items():
        if after[name] - before[name] > limit:
            counts.faults.append(
                f"seed {seed}: {name}: {before[name]:,} after {WARM} cycles, {after[name]:,} after {rounds:,} more"
            )
    return counts
