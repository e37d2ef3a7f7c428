"""The tables of `docs/notes/gpu.md`, from what `python -m bench.gpu.questions` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.questions.names import (
    AFTER,
    FIRST,
    FROZEN,
    KINDS,
    LIBRARIES,
    LIBRARY_SHRINK,
    PLAIN,
    SHRINK,
    SPECIALISED,
    WITHOUT_OVERLAP,
    training,
)
from bench.page_tables import markdown

NOTHING = "Not measured: no GPU was available so far, and nothing on this page says how fast anything is on one."
Ratios = Mapping[str, Mapping[str, float]]


def page(found: Mapping[str, Any]) -> str:
    """All tables of one GPU, with what they were measured with."""
    parts = [f"**{found['origin']['device']}**", _provenance(found)]
    parts += _shares(found["products"])
    parts += _composed([each for each in found["products"] if each["product"]["direction"] == "forward"])
    parts += _training(found["steps"])
    refused = [f"- {name}: {reason}" for name, reason in found["refused"].items()]
    left_out = [f"- {name}: {reason}" for name, reason in found["left_out"].items()]
    wrong = [f"- {each}" for each in found["wrong"]]
    for title, lines in (("Could not run:", refused), ("Left out:", left_out), ("WRONG:", wrong)):
        if lines:
            parts.append("\n".join([title, "", *lines]))
    return "\n\n".join(parts)


def _provenance(found: Mapping[str, Any]) -> str:
    origin, versions = found["origin"], found["environment"]["versions"]
    return (
        f"torch {versions['torch']}, Triton {versions['triton']}, peft {versions['peft']}, {origin['date']}, commit "
        f"{origin['commit']}. Medians of ratios within interleaved rounds."
    )


def _place(product: Mapping[str, Any]) -> list[str]:
    return [f"{product['k']}×{product['n']}", str(product["m"])]


def _best(ratios: Ratios, kind: str) -> tuple[str, float] | None:
    """The fastest contestant of a kind: its tile, and its time over the bare product's."""
    found = {name: ratio["median"] for name, ratio in ratios.items() if name.startswith(f"{kind} ")}
    if not found:
        return None
    name = min(found, key=found.__getitem__)
    return name.removeprefix(f"{kind} "), found[name]


def _share(best: tuple[str, float] | None) -> list[str]:
    return ["–", ""] if best is None else [f"{1 / best[1]:.1%}", f"`{best[0]}`"]


def _shares(products: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in products:
        product = each["product"]
        rate = 2e-6 * product["m"] * product["n"] * product["k"] / each["bare_us"]
        shares = [*_share(_best(each["ratios"], PLAIN)), *_share(_best(each["ratios"], SPECIALISED))]
        lines.append([product["direction"], *_place(product), f"{rate:.0f}", *shares])
    if not lines:
        return []
    header = ["product", "K×N", "M", "library, TFLOP/s", "ours", "tile", "specialised", "tile"]
    return ["*Our GEMM by itself: its speed as a share of the library's*", markdown(header, lines, left=2)]


def _median(ratios: Ratios, name: str | None) -> str:
    return "–" if name is None or name not in ratios else f"{ratios[name]['median']:.3f}"


def _of_kind(ratios: Ratios, kind: str, overlap: bool = True) -> str | None:
    """The one contestant of a kind, its launches overlapping or not; None where it could not run."""
    return next((n for n in ratios if n.startswith(f"{kind} ") and n.endswith(WITHOUT_OVERLAP) != overlap), None)


def _composed(products: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in products:
        ratios: Ratios = each["ratios"]
        tail, serial = _of_kind(ratios, "tail"), _of_kind(ratios, "tail", overlap=False)
        hidden = "–"
        if tail is not None and serial is not None:
            hidden = f"{each['bare_us'] * (ratios[serial]['median'] - ratios[tail]['median']):+.1f}"
        names = (SHRINK, LIBRARY_SHRINK, tail, serial)
        single = _median(ratios, _of_kind(ratios, "single"))
        libraries = [_median(ratios, name) for name in (AFTER, FIRST)]
        measured = [f"{each['bare_us']:.0f}", *(_median(ratios, name) for name in names), hidden, single, *libraries]
        lines.append([*_place(each["product"]), *measured])
    if not lines:
        return []
    header = [
        "K×N", "M", "library, µs", "shrink", "shrink by the library", "tail", "tail, without overlap", "hidden, µs",
        "single", "S·Bᵀ after", "S·Bᵀ first",
    ]  # fmt: skip
    title = "*The forward pass and its parts, r = 16: time over the bare library product's*"
    return [title, markdown(header, lines, left=1)]


def _training(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in steps:
        profiles = each["profiles"]
        for name in (FROZEN, *(training(kind, library) for library in LIBRARIES for kind in KINDS)):
            ratio = "1" if name == FROZEN else _median(each["ratios"], name)
            one = profiles[name]
            numbers = (one["launches"], one["waits"], round(one["microseconds"]), one["operators"])
            lines.append([each["title"], name, ratio, *(f"{number:,}" for number in numbers)])
        over = {
            library: each["ratios"][training("AdaLoRA", library)]["median"]
            / each["ratios"][training("LoRA", library)]["median"]
            for library in LIBRARIES
        }
        lines.append(
            [each["title"], "AdaLoRA over LoRA", f"peft {over['peft']:.3f}, ours {over['ours']:.3f}", *[""] * 4]
        )
    if not lines:
        return []
    header = ["model", "step", "over frozen", "launches", "waits", "device, µs", "operators"]
    return ["*A training step, and what it launched under the profiler*", markdown(header, lines, left=2)]
