"""Writes the tables of README.md and of the pages in docs/, and the plots, from `bench/results/`.

    python -m bench.report [--demo FILE] [--comparison FILE] [--results DIR] [--root DIR] [--plots DIR]

`PAGES` says which table stands in which page. `--demo` first keeps the figures of a demo that was run (its
results.json), as `bench/results/demo-<machine>.json`; `--comparison` those of a comparison of strategies (its
comparison.json), as `bench/results/allocators-<machine>.json`. The figures of HF peft on peftkernels are those that
`python -m bench.peft_backend --json` keeps as `bench/results/peft-backend-<machine>.json`; the notes on the GPU are
answered from `bench/results/questions-<gpu>.json`, which `bench/run_gpu.sh --questions` writes; the attacks' table is
that of `bench/results/attacks-<machine>.json`, which `make attacks` writes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import page_allocators, page_attacks, page_measured, page_peft, page_tables, results
from bench.goals import judge
from bench.gpu import page as gpu_page
from bench.gpu import plots as gpu_plots
from bench.gpu.questions import page as questions
from bench.plots import Plot, draw_all
from bench.results import CPU, ResultsError, Row
from demo.compare.plot import write_plot
from peftkernels._files import write_text

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results"
# Within docs/, so that the site has them.
PICTURES = Path("docs", "pictures")
# The page of each table, beside which README.md and docs/ lie, by the marker around it.
PAGES = {
    "measured": "README.md",
    "demo": "docs/measurements/index.md",
    "goals": "docs/measurements/index.md",
    "layers": "docs/measurements/layers.md",
    "memory": "docs/measurements/layers.md",
    "plots": "docs/measurements/layers.md",
    "training": "docs/measurements/training.md",
    "peft": "docs/measurements/huggingface.md",
    "allocators": "docs/measurements/strategies.md",
    "gpu": "docs/triton.md",
    "questions": "docs/notes/gpu.md",
    "attacks": "docs/attacks.md",
}


class ReportError(Exception):
    """Something that the report needs is missing or cannot be used."""


def replace_between(text: str, marker: str, content: str, path: Path) -> str:
    """`text`, that of `path`, with what stands between `<!-- marker -->` and `<!-- /marker -->` replaced."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ReportError(f"{path}: found no markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def keep_demo(source: Path, folder: Path) -> None:
    """Keep what a demo's results.json says of steps, accuracies and losses; not where it wrote its files."""
    try:
        found = json.loads(source.read_text())
        kept = {key: found[key] for key in ("date", "seconds", "versions", "data", "runs", "agreement")}
        kept["machine"] = {key: value for key, value in found["machine"].items() if key != "system"}
        kept["timing"] = {key: value for key, value in found["timing"].items() if key != "milliseconds"}
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"--demo: {source}: cannot be read as a demo's results.json: {error!r}") from error
    for run in kept["runs"].values():
        run.pop("masks", None)
        run.pop("training_loop_milliseconds", None)
    name = Path(results.file_name()).stem
    write_text(folder / f"demo-{name}.json", json.dumps(kept, indent=1) + "\n")


def keep_comparison(source: Path, folder: Path) -> None:
    """Keep a comparison's comparison.json, once its tables can be made from it."""
    try:
        kept = page_allocators.kept(page_allocators.load(source))
        page_allocators.page(kept, "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"--comparison: {source}: cannot be read as a comparison.json: {error!r}") from error
    name = Path(results.file_name()).stem
    write_text(folder / f"allocators-{name}.json", json.dumps(kept, indent=1) + "\n")


def load(folder: Path) -> dict[Path, list[Row]]:
    """Rows by results file; raises ReportError without any of a CPU."""
    files = {path: results.read(path) for path in sorted(folder.glob("*.csv"))}
    if not any(row.device == CPU for rows in files.values() for row in rows):
        raise ReportError(f"{folder}: found no results (*.csv); run `make bench` first")
    return files


def write_report(folder: Path, root: Path, plots: Path) -> list[Path]:
    """Write everything; returns the files."""
    loaded = load(folder)
    files = {path: rows for path, rows in loaded.items() if all(row.device == CPU for row in rows)}
    on_gpus = {path: rows for path, rows in loaded.items() if path not in files}
    demos = sorted(folder.glob("demo-*.json"))
    if not demos:
        raise ReportError(f"{folder}: found no demo-*.json; run `make demo`, then `make report ARGS='--demo FILE'`")
    texts = {page: _text(root / page) for page in dict.fromkeys(PAGES.values())}
    parts = {
        "measured": [page_measured.page(files, on_gpus)],
        "goals": [f"{page_tables.goals(judge(rows))}\n\n{page_tables.provenance(rows)}" for rows in files.values()],
        "layers": [_with_provenance(page_tables.layers, rows) for rows in files.values()],
        "training": [_with_provenance(page_tables.training, rows) for rows in files.values()],
        "memory": [page_tables.memory(page_tables.Figures(rows)) for rows in files.values()],
        "demo": [page_tables.demo(path) for path in demos],
        "peft": [_peft(path) for path in sorted(folder.glob("peft-backend-*.json"))] or [page_peft.NOTHING],
        "questions": [_answers(path) for path in sorted(folder.glob("questions-*.json"))] or [questions.NOTHING],
        "attacks": [_attacks(path) for path in sorted(folder.glob("attacks-*.json"))] or [page_attacks.NOTHING],
    }
    drawn: list[Path] = []

    def link(plot: Plot, marker: str) -> str:
        drawn.append(plot.path)
        return f"![{plot.title}]({os.path.relpath(plot.path, (root / PAGES[marker]).parent)})"

    links = []
    for path, rows in files.items():
        found = draw_all(rows, plots, prefix="" if len(files) == 1 else f"{path.stem}-")
        links += [link(plot, "plots") for plot in found]
    parts["plots"] = links or ["Too few cases were measured to draw any."]
    parts["gpu"] = [] if on_gpus else [gpu_page.NOTHING]
    for path, rows in on_gpus.items():
        found = gpu_plots.draw_all(rows, plots, prefix=f"{path.stem}-")
        parts["gpu"].append(gpu_page.page(rows, [link(plot, "gpu") for plot in found]))
    comparisons = sorted(folder.glob("allocators-*.json"))
    parts["allocators"] = [] if comparisons else [page_allocators.NOTHING]
    for path in comparisons:
        comparison = page_allocators.load(path)
        picture = plots / f"{path.stem if len(comparisons) > 1 else 'allocators'}.png"
        write_plot(picture, comparison)
        plot = Plot(picture, "Test accuracy of rank-allocation strategies at equal budget")
        parts["allocators"].append(page_allocators.page(comparison, link(plot, "allocators")))
    parts["allocators"] += [part for part in map(page_allocators.steps, files.values()) if part is not None]
    for marker, page in PAGES.items():
        texts[page] = replace_between(texts[page], marker, "\n\n".join(parts[marker]), root / page)
    for page, text in texts.items():
        write_text(root / page, text)
    return [*(root / page for page in texts), *drawn]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ReportError(f"--root: {path}: {error.strerror}") from error


def _with_provenance(table: Callable[[page_tables.Figures], str], rows: Sequence[Row]) -> str:
    return f"{table(page_tables.Figures(rows))}\n\n{page_tables.provenance(rows)}"


def _answers(path: Path) -> str:
    try:
        return questions.page(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: cannot be read as answers of bench.gpu.questions: {error!r}") from error


def _attacks(path: Path) -> str:
    try:
        return page_attacks.page(page_attacks.load(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: cannot be read as counts of attacks: {error!r}") from error


def _peft(path: Path) -> str:
    try:
        return page_peft.page(page_peft.load(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: cannot be read as figures of bench.peft_backend: {error!r}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Write the tables of README.md and of the pages in docs/, and docs/pictures/, from bench/results/.",
    )
    parser.add_argument("--demo", type=Path, metavar="FILE", help="results.json of a demo to keep first")
    parser.add_argument("--comparison", type=Path, metavar="FILE", help="comparison.json to keep first")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ lie")
    parser.add_argument("--plots", type=Path, metavar="DIR", help=f"default: {PICTURES} there")
    options = parser.parse_args(arguments)
    try:
        if options.demo is not None:
            keep_demo(options.demo, options.results)
        if options.comparison is not None:
            keep_comparison(options.comparison, options.results)
        for path in write_report(options.results, options.root, options.plots or options.root / PICTURES):
            print(f"written: {path}")
    except (ReportError, ResultsError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
