"""What a run leaves behind beside its CSV: one JSON file with everything, tables for people, plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import lineup
from bench.cases import ENQUEUE, Case
from bench.goals import GPU_GOALS, Reached, judge
from bench.gpu.device import Cuda, Device
from bench.gpu.job import Found
from bench.results import Origin
from bench.runner import Measured
from bench.table import goals_table, group_table
from peftkernels._files import write_text
from peftkernels.cli.machine import machine, versions


def environment(device: Device) -> dict[str, Any]:
    """Device, driver and versions that the figures belong to."""
    found: dict[str, Any] = {
        "device": device.name,
        "versions": {**versions(["torch", "triton", "peft", "transformers"]), "python": platform.python_version()},
        "cuda": torch.version.cuda,
        "processor": machine()["processor"],
        "cores": os.cpu_count(),
    }
    if isinstance(device, Cuda):
        facts = torch.cuda.get_device_properties(device.place)
        found.update(
            capability=f"{facts.major}.{facts.minor}",
            multiprocessors=facts.multi_processor_count,
            memory_bytes=facts.total_memory,
            l2_bytes=device.cache_bytes,
        )
    return found


def judged(found: Found, cases: Sequence[Case]) -> list[Reached]:
    """The GPU's goals beside what was found; `cases` are all that could have been measured."""
    return judge(found.rows, GPU_GOALS, cases)


def write_json(path: Path, found: Found, cases: Sequence[Case], device: Device, common: Origin) -> None:
    """Everything a run found, written beside `path` and then put in its place."""
    content = {
        "origin": asdict(common),
        "environment": environment(device),
        "goals": [
            {
                "title": reached.goal.title,
                "statistic": reached.goal.statistic,
                "limit": reached.goal.limit,
                "value": reached.value,
                "verdict": reached.verdict,
                "measured_cases": reached.cells,
                "cases": reached.expected,
                "worst_case": reached.worst,
                "worst_value": reached.worst_value,
            }
            for reached in judged(found, cases)
        ],
        "failed": found.failed,
        "left_out": found.left_out,
        "served": found.served,
        "rows": [asdict(row) for row in found.rows],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def print_tables(console: Console, found: Found, cases: Sequence[Case]) -> None:
    """Ratios by group, the host's time, and every goal, measured or not."""
    for group in dict.fromkeys(item.rows[0].group for item in found.measured):
        items = [item for item in found.measured if item.rows[0].group == group]
        console.print(host_table(items) if items[0].case.timing == ENQUEUE else group_table(group, items))
    console.print(
        f"× {lineup.FROZEN}: time over that of the bare library product F.linear in the same round, median (quartiles "
        "of ours); below 1 is faster. roofline: least time for operations and bytes at the peaks that were measured "
        "here, over the median. !: other processes disturbed most rounds.",
        highlight=False,
    )
    for title, reasons in (("failed", found.failed), ("left out", found.left_out)):
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            console.print(f"{title}: {len(names)} ({names[0]}{', …' if names[1:] else ''}): {reason}", highlight=False)
    table = goals_table(judged(found, cases), unmeasured=True)
    if table is not None:
        console.print(table)


def host_table(measured: Sequence[Measured]) -> Table:
    """What the host needs to enqueue a call, and how much longer that is than for F.linear."""
    table = Table(title="gpu-enqueue: the host's µs a call", title_justify="left", header_style="bold")
    for title, justify in (("case", "left"), ("contestant", "left"), ("µs", "right"), ("over F.linear, µs", "right")):
        table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
    for item in measured:
        for row in item.rows:
            assert row.ratio is not None
            frozen = item.rows[0].median_us
            table.add_row(row.id, row.contestant, f"{row.median_us:.1f}", f"{frozen * (row.ratio - 1):+.1f}")
    return table
