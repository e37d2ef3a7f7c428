"""``peftkernels report``: from a run directory to a page and its pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from peftkernels._files import write_atomically

REPORT = "report"
FIGURES = "report.json"
NEEDED = ("jinja2", "matplotlib")

DESCRIPTION = """\
Write one self-contained HTML page about what an allocator decided: where the ranks went and why, budget, threshold,
churn, revived ranks, skipped steps and rollbacks. Reads RUN_DIR/decisions.jsonl and RUN_DIR/runs/*/decisions.jsonl,
which DecisionLog and 'python -m demo' write; several runs are compared. A run in progress can be reported on.
"""

EPILOG = """\
written to --out:
  index.html     the page, pictures included: needs no other file, no network and no JavaScript
  *.png          the pictures
  report.json    every figure

exit codes: 0 done, 2 wrong input
"""


def run_report(directory: Path, out: Path | None, *, as_json: bool) -> int:
    """Write the report of ``directory`` to ``out`` (None: its folder report); returns the exit code."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"not installed: {', '.join(missing)}; install them with\n    pip install 'peftkernels[report]'")
    from peftkernels.cli.report.collect import ReportError, collect

    out = directory / REPORT if out is None else out
    if out.exists() and not out.is_dir():
        return _refuse(f"error: --out: {out}: is a file; expected a directory")
    try:
        collected = collect(directory)
    except ReportError as error:
        return _refuse(f"error: {error}")
    from peftkernels.cli.report.history import History
    from peftkernels.cli.report.page import PAGE, render

    figures: dict[str, Any] = {"runs": {name: History(log).as_dict() for name, log in collected.logs.items()}}
    text = json.dumps(figures, indent=1) + "\n"
    files = {**render(collected), FIGURES: text.encode()}
    try:
        for name, content in files.items():
            _write(out / name, content)
    except OSError as error:
        return _refuse(f"error: --out: {out}: cannot be written: {error.strerror}")
    if as_json:
        print(text, end="")
    else:
        print(f"Written: {out / PAGE}, with {len(files) - 2} pictures and {FIGURES} beside it.")
    return 0


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _refuse(message: str) -> int:
    print(f"peftkernels report: {message}", file=sys.stderr)
    return 2
