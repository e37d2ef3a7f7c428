"""The tables and the picture of `bench.adapter_scale`, from its results file."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.adapter_run import Point
from bench.page_tables import markdown
from bench.report import ReportError, replace_between
from peftkernels._files import write_atomically, write_text

Run = dict[str, Any]
Setting = tuple[str, float, float, float, float]
# Colours of Okabe and Ito, told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def setting(run: Run) -> Setting:
    """All of a run's point but its seed: adapter, learning rate, scale, orthogonality weight, gates' multiplier."""
    point = run["point"]
    return run["adapter"], point["lr"], point["scale"], point["orth"], point["gate_lr"]


def by_setting(runs: Iterable[Run]) -> dict[Setting, dict[int, Run]]:
    """Runs by setting, then by seed."""
    found: dict[Setting, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(setting(run), {})[run["point"]["seed"]] = run
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def repeated_table(runs: Sequence[Run]) -> str:
    """Settings trained with several seeds: accuracies in per cent, also less those of LoRA with the same final rank.

    Of several repeated LoRA it is the one with the highest mean validation accuracy.
    """
    settings = {key: seeds for key, seeds in by_setting(runs).items() if len(seeds) > 1}
    rows = []
    for key, seeds in settings.items():
        reference = _reference(settings, seeds)
        differences = None
        if reference is not None and reference is not seeds:
            differences = [
                100 * (run["test"]["accuracy"] - reference[seed]["test"]["accuracy"]) for seed, run in seeds.items()
            ]
        rows.append(
            [
                *_cells(key),
                str(len(seeds)),
                _with_error([100 * run["validation"]["accuracy"] for run in seeds.values()]),
                _with_error([100 * run["test"]["accuracy"] for run in seeds.values()]),
                "" if differences is None else _with_error(differences, sign=True),
                f"{statistics.fmean(run['growth'][-1]['delta'] for run in seeds.values()):.3f}",
            ]
        )
    header = [*_HEADER, "seeds", "validation, %", "test, %", "test − LoRA, points", "‖ΔW‖_F"]
    return markdown(header, rows, left=1)


def single_table(runs: Sequence[Run], seed: int = 0) -> str:
    """Every setting's run with one seed."""
    rows = []
    for run in sorted((run for run in runs if run["point"]["seed"] == seed), key=_order):
        last = run["growth"][-1]
        entropy = run["validation"]["cross_entropy"]
        rows.append(
            [
                *_cells(setting(run)),
                f"{100 * run['validation']['accuracy']:.1f}",
                "not finite" if entropy is None else f"{entropy:.3f}",
                f"{last['delta']:.3f}",
                f"{100 * last['outputs']:.2f}",
                " / ".join(f"{last[name]:.3f}" for name in ("A", "B", "E") if name in last),
            ]
        )
    header = [*_HEADER, "validation, %", "cross-entropy", "‖ΔW‖_F", "‖ΔW·x‖/‖W·x‖, %", "A / B / E"]
    return markdown(header, rows, left=1)


def formula_table(runs: Sequence[Run], seed: int = 0) -> str:
    """‖ΔW‖_F by the page's formulas from the factors' sizes, beside the measured one; early and at the end.

    The formula is that of independent ranks in a square layer of width WIDTH: s·√r · √K·rms(A) · √N·rms(B) · rms(E),
    with the rank at the start in the early step and the live ranks at the end; c is the rms of LoRA's B, or of the
    gates, over the sum of the learning rates so far.
    """
    rows = []
    for run in sorted((run for run in runs if run["point"]["seed"] == seed), key=_order):
        cells = _cells(setting(run))
        steps = [at["step"] for at in run["growth"]]
        for at in (run["growth"][max(0, bisect_right(steps, run["steps"] // 8) - 1)], run["growth"][-1]):
            rank = run["point"]["rank"] if at is not run["growth"][-1] else _final_rank(run)
            moved = at["B"] if run["point"]["target"] is None else at["E"] / run["point"]["gate_lr"]
            formula = run["point"]["scale"] * rank**0.5 * WIDTH * at["A"] * at["B"] * at.get("E", 1.0)
            cells += [f"{moved / at['lr_sum']:.2f}", f"{formula:.3g}", f"{at['delta']:.3g}"]
        rows.append(cells)
    eighth = "after 1/8 of the steps"
    columns = [f"{eighth}: c", "formula", "measured", "at the end: c", "formula", "measured"]
    return markdown([*_HEADER, *columns], rows, left=1)


# Outputs and inputs of most of MiniLM's layers.
WIDTH = 384
_HEADER = ("adapter", "learning rate", "scale", "orthogonality", "gates' rate")


def _cells(key: Setting) -> list[str]:
    adapter, lr, scale, orth, gate_lr = key
    is_lora = adapter.startswith("LoRA")
    return [adapter, f"{lr:g}", f"{scale:.3g}", "" if is_lora else f"{orth:g}", "" if is_lora else f"×{gate_lr:g}"]


def _order(run: Run) -> tuple[Any, ...]:
    point = run["point"]
    return point["target"] is not None, -point["rank"], run["adapter"], point["lr"], point["scale"], point["orth"]


def _final_rank(run: Run) -> int:
    point = Point(**run["point"])
    return point.rank if point.target is None else point.target


def _reference(settings: dict[Setting, dict[int, Run]], seeds: dict[int, Run]) -> dict[int, Run] | None:
    """The runs of LoRA with the same final rank, of the setting that validation prefers."""
    rank = _final_rank(next(iter(seeds.values())))
    rivals = [
        runs
        for runs in settings.values()
        if runs.keys() >= seeds.keys()
        and next(iter(runs.values()))["point"]["target"] is None
        and _final_rank(next(iter(runs.values()))) == rank
    ]

    def accuracy(runs: dict[int, Run]) -> float:
        return statistics.fmean(run["validation"]["accuracy"] for run in runs.values())

    return max(rivals, key=accuracy, default=None)


def _with_error(values: Sequence[float], sign: bool = False) -> str:
    mean, error = mean_and_error(values)
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if error is None else f"{text} ± {error:.1f}"


def draw(runs: Sequence[Run], path: Path, seed: int = 0) -> None:
    """Growth of the adapters' share of the outputs, and the cross-entropy against the rule's size of a step."""
    figure, (growth, entropy) = pyplot.subplots(1, 2, figsize=(12.0, 5.4), layout="constrained")
    shown = [run for run in runs if run["point"]["seed"] == seed and _final_rank(run) == max(map(_final_rank, runs))]
    shown.sort(key=rule_step)
    of_lora = [run for run in shown if run["point"]["target"] is None]
    curves = of_lora + [run for run in shown if run["adapter"].startswith("AdaLoRA") and run["point"]["orth"] != 0]
    for number, run in enumerate(curves):
        points = [(at["step"], 100 * at["outputs"]) for at in run["growth"]]
        style: dict[str, Any]
        if run in of_lora:
            style = {"color": "black", "linestyle": ("--", ":")[of_lora.index(run) % 2]}
        else:
            style = {"color": matplotlib.colormaps["viridis"](0.95 * (1 - number / len(curves)))}
        growth.plot(*zip(*points, strict=True), **style, label=_label(run))
    growth.set(xscale="log", yscale="log", xlabel="optimizer step", ylabel="‖ΔW·x‖ / ‖W·x‖, %")
    growth.set_title("What the adapters add to the layers' outputs", fontsize=10)
    figure.legend(*growth.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    rates = sorted({run["point"]["lr"] for run in shown})
    for run in shown:
        kind = run["adapter"].split(" ")[0]
        colour = _COLOURS[rates.index(run["point"]["lr"]) % len(_COLOURS)]
        value = run["validation"]["cross_entropy"]
        if value is not None:
            entropy.scatter(rule_step(run), value, s=34, marker=_MARKERS[kind], color=colour)
    for kind in dict.fromkeys(run["adapter"].split(" ")[0] for run in shown):
        entropy.scatter([], [], marker=_MARKERS[kind], color="grey", label=kind)
    for colour, rate in zip(_COLOURS, rates, strict=False):
        entropy.scatter([], [], marker="s", color=colour, label=f"rate {rate:g}")
    entropy.set(xscale="log", xlabel="‖ΔW‖_F of a step by the rule", ylabel="validation cross-entropy, nats")
    entropy.set_title("Learning rate × scale decides", fontsize=10)
    entropy.legend(fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png", metadata={"Software": None}))
    pyplot.close(figure)


def rule_step(run: Run) -> float:
    """How far a step moves ‖ΔW‖_F by the rule: η·s·√(r·N/3) for LoRA, η·s·√r₀ for gates."""
    point = run["point"]
    size = point["lr"] * point["gate_lr"] * point["scale"]
    return size * float(point["rank"] * (WIDTH / 3 if point["target"] is None else 1)) ** 0.5


_MARKERS = {"LoRA": "D", "AdaLoRA": "o", "gated": "s"}


def _label(run: Run) -> str:
    point = run["point"]
    term = "" if point["target"] is None else f", orthogonality {point['orth']:g}"
    gates = "" if point["gate_lr"] == 1 else f", gates ×{point['gate_lr']:g}"
    return f"{run['adapter']}: rate {point['lr']:g}, scale {point['scale']:.2g}{term}{gates}"


def write(results: dict[str, Any], picture: Path, docs: Path) -> None:
    """Draw the picture and replace the tables in `docs`; raises ReportError where it has no place for them."""
    runs = results["runs"]
    try:
        text = docs.read_text()
    except OSError as error:
        raise ReportError(f"--docs: {docs}: {error.strerror}") from error
    text = replace_between(text, "repeated", repeated_table(runs), docs)
    text = replace_between(text, "formula", formula_table(runs), docs)
    text = replace_between(text, "single", single_table(runs), docs)
    draw(runs, picture)
    write_text(docs, text)
