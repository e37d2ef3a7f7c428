"""The table of HF peft's models on peftkernels, from what `python -m bench.peft_backend` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.page_tables import markdown

NOTHING = "HF peft on peftkernels was not measured yet."
HEADINGS = (
    "model",
    "adapters",
    "gradients off by",
    "losses off by",
    "ms, stock",
    "ms",
    "times as fast (quartiles)",
    "adapter calls served",
    "allocation calls served",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table under `HEADINGS`; `row` is a `peft_backend.Row` by its names."""
    disturbed = " !" if row["disturbed"] else ""
    return [
        row["model"],
        f"{row['kind']}, dropout {row['dropout']:g}" if row["dropout"] else row["kind"],
        _distance(row["gradient_error"]),
        _distance(row["loss_distance"]),
        f"{row['stock_milliseconds']:.0f}",
        f"{row['milliseconds']:.0f}",
        f"{row['speed']:.2f} ({row['speed_p25']:.2f}–{row['speed_p75']:.2f}){disturbed}",
        _share(row["served"], row["fell_back"]),
        _share(row["allocation_served"], row["allocation_fell_back"]),
    ]


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _share(served: int | None, fell_back: int | None) -> str:
    """Served of all; "–" where there are no such calls."""
    if served is None or fell_back is None:
        return "–"
    return f"{served:,} of {served + fell_back:,}" if fell_back else f"all {served:,}"


def _all_of(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(map(str, sorted({row[name] for row in rows}))) or "none"


def load(path: Path) -> dict[str, Any]:
    """The content of a peft-backend file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def page(measured: Mapping[str, Any]) -> str:
    """Table, what its columns are, and provenance."""
    rows = measured["rows"]
    steps, with_dropout = (_all_of([row for row in rows if bool(row["dropout"]) == some], "steps") for some in (0, 1))
    host, packages = measured["machine"], measured["versions"]
    discarded = sum(row["discarded"] for row in rows)
    text = (
        f"Training steps (forward, backward, AdamW, AdaLoRA's allocation) of the stock and the patched model in turns, "
        f"{steps} a model, {with_dropout} with dropout. Gradients: the largest relative error of a parameter's in the "
        "first step; losses: the largest difference in any step. With dropout the two drop other elements, and neither "
        "can be compared. "
        f"{host['processor']}, {host['cores']} cores, {measured['threads']} threads, torch {packages['torch']}, "
        f"peft {packages['peft']}, transformers {packages['transformers']}, {measured['date'][:10]}, commit "
        f"{measured['commit']}; {sum(row['rounds'] for row in rows):,} pairs of steps, {discarded:,} disturbed ones "
        "left out."
    )
    disturbed = sum(row["disturbed"] for row in rows)
    if disturbed:
        text += f" In {disturbed} rows (marked !) most were disturbed: their times are not to be relied on."
    return f"{markdown(HEADINGS, [cells(row) for row in rows], left=2)}\n\n{text}"
