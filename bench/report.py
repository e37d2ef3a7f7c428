"""Writes the tables of README, `docs/notes/gpu.md` and `docs/attacks.md`, and the plots, from `bench/results/`.

    python -m bench.report [--demo peftkernels-demo/results.json] [--comparison peftkernels-comparison/comparison.json]
                           [--results DIR] [--readme FILE] [--notes FILE] [--attacks FILE] [--plots DIR]

`--demo` first keeps the figures of a demo that was run, as `bench/results/demo-<machine>.json`; `--comparison` those of
a comparison of strategies, as `bench/results/allocators-<machine>.json`. The figures of HF peft on peftkernels are
those that `python -m bench.peft_backend --json` keeps as `bench/results/peft-backend-<machine>.json`; the notes are
answered from `bench/results/questions-<gpu>.json`, which `bench/run_gpu.sh --questions` writes; the attacks' table is
that of `bench/results/attacks-<machine>.json`, which `make attacks` writes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.compare.plot import write_plot
from peftkernels._files import write_text

from . import attacks_page, readme_allocators, readme_peft, readme_tables, results
from .goals import judge
from .gpu import plots as gpu_plots
from .gpu import readme as gpu_readme
from .gpu.questions import page as questions
from .plots import Plot, draw_all
from .results import CPU, ResultsError, Row

HERE = Path(__file__).resolve().parent
RESULTS, PLOTS, README = HERE / "results", HERE / "plots", HERE.parent / "README.md"
NOTES = HERE.parent / "docs" / "notes" / "gpu.md"
ATTACKS = HERE.parent / "docs" / "attacks.md"


class ReportError(Exception):
    """Something that the report needs is missing or cannot be used."""


def replace_between(text: str, marker: str, content: str) -> str:
    """`text` with what stands between `<!-- marker -->` and `<!-- /marker -->` replaced."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ReportError(f"found no markers {begin} and {end}")
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
        kept = readme_allocators.kept(readme_allocators.load(source))
        readme_allocators.page(kept, "")
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


def write_report(folder: Path, readme: Path, notes: Path, attacks: Path, plots: Path) -> list[Path]:
    """Write everything; returns the files."""
    loaded = load(folder)
    files = {path: rows for path, rows in loaded.items() if all(row.device == CPU for row in rows)}
    on_gpus = {path: rows for path, rows in loaded.items() if path not in files}
    demos = sorted(folder.glob("demo-*.json"))
    if not demos:
        raise ReportError(f"{folder}: found no demo-*.json; run `make demo`, then `make report ARGS='--demo FILE'`")
    written = {"--readme": readme, "--notes": notes, "--attacks": attacks}
    texts = {option: _text(option, path) for option, path in written.items()}
    pages = {
        "goals": [f"{readme_tables.goals(judge(rows))}\n\n{readme_tables.provenance(rows)}" for rows in files.values()],
        "layers": [readme_tables.layers(readme_tables.Figures(rows)) for rows in files.values()],
        "training": [readme_tables.training(readme_tables.Figures(rows)) for rows in files.values()],
        "memory": [readme_tables.memory(readme_tables.Figures(rows)) for rows in files.values()],
        "demo": [readme_tables.demo(path) for path in demos],
        "peft": [_peft(path) for path in sorted(folder.glob("peft-backend-*.json"))] or [readme_peft.NOTHING],
    }
    drawn: list[Path] = []
    links = []
    for path, rows in files.items():
        found = draw_all(rows, plots, prefix="" if len(files) == 1 else f"{path.stem}-")
        drawn += [plot.path for plot in found]
        links += [_link(plot, readme) for plot in found]
    pages["plots"] = ["\n\n".join(links) or "Too few cases were measured to draw any."]
    pages["gpu"] = [gpu_readme.NOTHING]
    if on_gpus:
        pages["gpu"] = []
        for path, rows in on_gpus.items():
            found = gpu_plots.draw_all(rows, plots, prefix=f"{path.stem}-")
            drawn += [plot.path for plot in found]
            pages["gpu"].append(gpu_readme.page(rows, [_link(plot, readme) for plot in found]))
    pages["allocators"] = []
    comparisons = sorted(folder.glob("allocators-*.json"))
    for path in comparisons:
        comparison = readme_allocators.load(path)
        picture = plots / f"{path.stem if len(comparisons) > 1 else 'allocators'}.png"
        write_plot(picture, comparison)
        drawn.append(picture)
        link = _link(Plot(picture, "Test accuracy of rank-allocation strategies at equal budget"), readme)
        pages["allocators"].append(readme_allocators.page(comparison, link))
    if not comparisons:
        pages["allocators"] = [readme_allocators.NOTHING]
    pages["allocators"] += [part for part in map(readme_allocators.steps, files.values()) if part is not None]
    for marker, parts in pages.items():
        texts["--readme"] = replace_between(texts["--readme"], marker, "\n\n".join(parts))
    answers = [_answers(path) for path in sorted(folder.glob("questions-*.json"))] or [questions.NOTHING]
    texts["--notes"] = replace_between(texts["--notes"], "questions", "\n\n".join(answers))
    tried = [_attacks(path) for path in sorted(folder.glob("attacks-*.json"))] or [attacks_page.NOTHING]
    texts["--attacks"] = replace_between(texts["--attacks"], "attacks", "\n\n".join(tried))
    for option, path in written.items():
        write_text(path, texts[option])
    return [*written.values(), *drawn]


def _text(option: str, path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ReportError(f"{option}: {path}: {error.strerror}") from error


def _answers(path: Path) -> str:
    try:
        return questions.page(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: cannot be read as answers of bench.gpu.questions: {error!r}") from error


def _attacks(path: Path) -> str:
    try:
        return attacks_page.page(attacks_page.load(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: cannot be read as counts of attacks: {error!r}") from error


def _peft(path: Path) -> str:
    try:
        return readme_peft.page(readme_peft.load(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: cannot be read as figures of bench.peft_backend: {error!r}") from error


def _link(plot: Plot, readme: Path) -> str:
    return f"![{plot.title}]({os.path.relpath(plot.path, readme.parent)})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Write the tables of README.md, docs/notes/gpu.md and docs/attacks.md, and bench/plots/, "
        "from bench/results/.",
    )
    parser.add_argument("--demo", type=Path, metavar="FILE", help="results.json of a demo to keep first")
    parser.add_argument("--comparison", type=Path, metavar="FILE", help="comparison.json to keep first")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default: README.md")
    parser.add_argument("--notes", type=Path, default=NOTES, metavar="FILE", help="default: docs/notes/gpu.md")
    parser.add_argument("--attacks", type=Path, default=ATTACKS, metavar="FILE", help="default: docs/attacks.md")
    parser.add_argument("--plots", type=Path, default=PLOTS, metavar="DIR", help="default: bench/plots")
    options = parser.parse_args(arguments)
    try:
        if options.demo is not None:
            keep_demo(options.demo, options.results)
        if options.comparison is not None:
            keep_comparison(options.comparison, options.results)
        for path in write_report(options.results, options.readme, options.notes, options.attacks, options.plots):
            print(f"written: {path}")
    except (ReportError, ResultsError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
