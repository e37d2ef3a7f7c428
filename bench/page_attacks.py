"""The table of docs/attacks.md, from what `python -m attacks --keep` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.page_tables import markdown

NOTHING = "No long run was kept yet: `make attacks`, then `make report`."
HEADINGS = ("attack", "what is tried", "what came of it", "tried", "faults", "seconds", "seed", "date")


def load(path: Path) -> dict[str, Any]:
    """The content of an attacks file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def page(found: Mapping[str, Any]) -> str:
    """Table and provenance."""
    rows = [
        [
            f"`{attack['name']}`",
            attack["title"],
            ", ".join(f"{count:,} {kind}" for kind, count in attack["tried"].items()),
            f"{sum(attack['tried'].values()):,}",
            f"{len(attack['faults']):,}",
            f"{attack['seconds']:,.0f}",
            str(attack["seed"]),
            attack["date"][:10],
        ]
        for attack in found["attacks"]
    ]
    machine, versions = found["machine"], found["versions"]
    provenance = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}, "
        f"peft {versions['peft']}, transformers {versions['transformers']}."
    )
    return f"{markdown(HEADINGS, rows, left=3)}\n\n{provenance}"
