"""Writes the tables between the markers of README.md from the files under `bench/results/`.

    python -m bench.readme [--demo peftkernels-demo/results.json]

`--demo` first keeps the figures of a demo that was run, as `bench/results/demo-<machine>.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.lora_linear import EAGER, FUSED, PASSES, TOKENS, WIDTHS, default_path
from peftkernels.cli.demo.recipe import TITLES
from peftkernels.cli.demo.timing import FROZEN

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned left and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_tables(path: Path) -> str:
    """Ratios to the bare frozen layer by width and tokens, one table for each dtype and pass."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def place(row: dict[str, str]) -> tuple[str, str, str, int, str]:
        return row["dtype"], row["direction"], f"{row['K']}x{row['N']}", int(row["M"]), row["contestant"]

    ratios = {place(row): float(row["ratio"]) for row in rows}
    sample = rows[0]
    commits = sorted({row["commit"] for row in rows})
    parts = [
        f"Time relative to the bare frozen `F.linear` of the same round, {FUSED} (eager LoRA in brackets); r = "
        f"{sample['rank']}, {sample['threads']} threads, {sample['processor']}, torch {sample['torch']}, "
        f"{sample['date']}, commit {', '.join(commits)}. Every factor takes part and gets its gradient."
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for direction in PASSES:
            table, cells = [], []
            for widths in WIDTHS:
                line = [widths.replace("x", "×")]
                for tokens in TOKENS:
                    fused = ratios.get((dtype, direction, widths, tokens, FUSED))
                    eager = ratios.get((dtype, direction, widths, tokens, EAGER))
                    line.append("" if fused is None or eager is None else f"{fused:.2f} ({eager:.2f})")
                    if fused is not None and eager is not None:
                        cells.append((fused, eager))
                table.append(line)
            if not cells:
                continue
            mean = [statistics.geometric_mean(column) for column in zip(*cells, strict=True)]
            title = f"{dtype}, {direction.replace('+', ' + ')}: geometric mean {mean[0]:.2f} ({mean[1]:.2f})"
            parts += [f"**{title}**", markdown(["K×N", *(f"M = {tokens}" for tokens in TOKENS)], table)]
    return "\n\n".join(parts)


def demo_table(path: Path) -> str:
    """The demo's table, as it printed it."""
    found = json.loads(path.read_text())
    machine, timing = found["machine"], found["timing"]
    rows = [
        [
            "frozen, forward + backward" if name == FROZEN else TITLES[name],
            "" if run["accuracy"] is None else f"{run['accuracy']:.3f}",
            f"{run['milliseconds']:.0f}",
            f"{run['ratio']:.2f} ({run['ratio_p25']:.2f}–{run['ratio_p75']:.2f})",
            "" if run["total_ranks"] is None else f"{run['live_ranks']} / {run['total_ranks']}",
            f"{run['trainable_parameters']:,}",
            f"{run['saved_bytes'] / 1e6:.1f} MB",
        ]
        for name, run in found["runs"].items()
    ]
    header = [
        "run",
        "test accuracy",
        "ms per step",
        "× frozen step (quartiles)",
        "ranks, live / all",
        "trainable parameters",
        "saved for backward",
    ]
    note = (
        f"{machine['processor']}, {machine['threads']} threads, torch {found['versions']['torch']}, "
        f"peft {found['versions']['peft']}, {found['date'][:10]}; {timing['rounds']} paired rounds, "
        f"{timing['discarded']} disturbed ones left out"
        + (", the machine was never quiet." if timing["disturbed"] else ".")
    )
    return f"{markdown(header, rows)}\n\n{note}"


def replace_between(text: str, marker: str, content: str) -> str:
    """`text` with what stands between `<!-- marker -->` and `<!-- /marker -->` replaced."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"{README.name}: found no markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def replace_file(path: Path, text: str) -> None:
    """Write beside `path`, then replace it."""
    beside = path.with_suffix(".partial")
    beside.write_text(text)
    os.replace(beside, path)


def keep_demo(path: Path) -> None:
    """Keep what a demo's results.json says of steps, accuracies and losses; not where it wrote its files."""
    found = json.loads(path.read_text())
    kept = {key: found[key] for key in ("date", "seconds", "versions", "data", "runs", "agreement")}
    kept["machine"] = {key: value for key, value in found["machine"].items() if key != "system"}
    kept["timing"] = {key: value for key, value in found["timing"].items() if key != "milliseconds"}
    for run in kept["runs"].values():
        run.pop("masks", None)
        run.pop("training_loop_milliseconds", None)
    replace_file(RESULTS / f"demo-{default_path().stem}.json", json.dumps(kept, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="Write README.md's tables.")
    parser.add_argument("--demo", type=Path, metavar="FILE", help="results.json of a demo to keep first")
    options = parser.parse_args()
    if options.demo is not None:
        keep_demo(options.demo)
    text = README.read_text()
    layers = sorted(RESULTS.glob("*.csv"))
    demos = sorted(RESULTS.glob("demo-*.json"))
    if not layers or not demos:
        raise SystemExit(f"{RESULTS}: expected a .csv of bench.lora_linear and a demo-*.json")
    text = replace_between(text, "layers", "\n\n".join(layer_tables(path) for path in layers))
    text = replace_between(text, "demo", "\n\n".join(demo_table(path) for path in demos))
    replace_file(README, text)


if __name__ == "__main__":
    main()
