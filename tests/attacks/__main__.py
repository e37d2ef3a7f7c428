"""Runs attacks on demand: `make attacks`, or `PYTHONPATH=.. python -m attacks` in the folder tests."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attacks import ATTACKS
from attacks.attack import load
from bench.results import file_name
from peftkernels._files import write_text
from peftkernels.cli.machine import PACKAGES, machine, versions


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Write what was counted into a file, whose counts of other attacks stay."""
    there = json.loads(path.read_text())["attacks"] if path.exists() else []
    by_name = {row["name"]: row for row in [*there, *rows]}
    kept = [by_name[name] for name in ATTACKS if name in by_name]
    found = {"machine": machine(), "versions": versions(PACKAGES), "attacks": kept}
    write_text(path, json.dumps(found, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where an attack found a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m attacks",
        description="Attack the package: many wrong or hostile uses, each of which must raise or be right.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which, default all: {', '.join(ATTACKS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each; default: each attack's long run")
    parser.add_argument("--share", type=float, default=1.0, metavar="S", help="of the long runs' rounds, such as 0.1")
    parser.add_argument("--short", action="store_true", help="as many rounds as `make test` runs")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="repeats a run; default: a new one")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="write the counts into DIR, for `make report`, in the place of earlier ones",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in ATTACKS]
    if unknown:
        parser.error(f"NAME: found {', '.join(unknown)}, expected some of {', '.join(ATTACKS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: found {options.rounds}, expected at least 1")
    if not 0 < options.share <= 1:
        parser.error(f"--share: found {options.share}, expected more than 0 and at most 1")
    seed = time.time_ns() % 2**31 if options.seed is None else options.seed
    rows: list[dict[str, Any]] = []
    for name in options.names or ATTACKS:
        attack = load(name)
        rounds = options.rounds or (attack.SHORT if options.short else max(1, round(options.share * attack.LONG)))
        print(f"{name}: {attack.TITLE}; {rounds:,} rounds, seed {seed}", flush=True)
        start = time.monotonic()
        counts = attack.run(rounds, seed)
        seconds = time.monotonic() - start
        print(f"{name}: {counts}\n{name}: {seconds:.0f} s", flush=True)
        rows.append(
            {
                "name": name,
                "title": attack.TITLE,
                "rounds": rounds,
                "tried": dict(sorted(counts.tried.items())),
                "faults": counts.faults,
                "seconds": round(seconds, 1),
                "seed": seed,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
    if options.keep is not None:
        keep(rows, options.keep / f"attacks-{Path(file_name()).stem}.json")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
