"""The README's table of what was measured: a line for each kind of work, beside HF peft."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import lineup
from bench.cases import BACKWARD, FORWARD, GROUPS
from bench.page_tables import TITLES_OF_DTYPES, Figures, markdown
from bench.results import Row

HEADINGS = ("time over that of the same work with everything frozen", "peftkernels", "HF peft")
_DEMO_RUNS = (("LoRA", "lora", "peft-lora"), ("AdaLoRA", "adalora", "peft-adalora"))
NO_GPU = "Nothing was measured on a GPU yet."


def page(on_cpus: Mapping[Path, Sequence[Row]], on_gpus: Mapping[Path, Sequence[Row]]) -> str:
    """A table for each results file of a CPU, with the demo that is kept beside it, and what there is of GPUs."""
    parts = [_table(Figures(rows), path.with_name(f"demo-{path.stem}.json")) for path, rows in on_cpus.items()]
    devices = sorted({row.device for rows in on_gpus.values() for row in rows})
    parts.append(f"Also measured on {', '.join(devices)}." if devices else NO_GPU)
    return "\n\n".join(parts)


def _table(figures: Figures, demo: Path) -> str:
    lines = [line for dtype in ("fp32", "bf16") for line in _layers(figures, dtype)]
    row = figures.rows[0]
    commits = ", ".join(sorted({row.commit for row in figures.rows}))
    note = (
        f"Layers: geometric means over all widths and rows of [the tables](docs/measurements/layers.md), r = {row.r}. "
        f"{row.processor}, {row.threads} threads, torch {row.torch}, peft {row.peft}; measured at commit {commits}"
    )
    if demo.exists():
        found = json.loads(demo.read_text())
        lines += _steps(found["runs"])
        note += f", the steps on {found['date'][:10]}"
    return f"{markdown(HEADINGS, lines)}\n\n{note}."


def _steps(runs: Mapping[str, Any]) -> list[list[str]]:
    return [
        [f"a training step of MiniLM, every linear layer with {title}", *(f"{runs[n]['ratio']:.2f}" for n in names)]
        for title, *names in _DEMO_RUNS
        if all(name in runs for name in names)
    ]


def _layers(figures: Figures, dtype: str) -> list[list[str]]:
    lines = []
    for direction in (FORWARD, BACKWARD):
        pairs = []
        for case in GROUPS[f"grid-{dtype}"]:
            if case.direction == direction:
                ours, theirs = figures.row(case, lineup.OURS), figures.row(case, lineup.PEFT_LORA_OF[dtype])
                if ours is not None and theirs is not None and ours.ratio is not None and theirs.ratio is not None:
                    pairs.append((ours.ratio, theirs.ratio))
        if pairs:
            means = [f"{statistics.geometric_mean(column):.2f}" for column in zip(*pairs, strict=True)]
            lines.append([f"one LoRA layer, {TITLES_OF_DTYPES[dtype]}, {direction.replace('+', ' + ')}", *means])
    return lines
