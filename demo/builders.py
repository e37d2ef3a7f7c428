"""A run by its name."""

from __future__ import annotations

from demo.recipe import PEFT_RUNS
from demo.runs import Run, Start, build_adalora, build_head, build_lora


def build(name: str, start: Start) -> Run:
    """The run ``name`` at its first step; HF peft is imported only for its own runs."""
    if name in PEFT_RUNS:
        from demo.peft_runs import build_peft_adalora, build_peft_lora

        return build_peft_lora(start) if name == "peft-lora" else build_peft_adalora(start)
    return {"head": build_head, "lora": build_lora, "adalora": build_adalora}[name](start)
