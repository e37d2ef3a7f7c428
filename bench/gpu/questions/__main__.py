"""`python -m bench.gpu.questions`: from its options to its file and its tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.device import Device
    from bench.gpu.questions import parts, steps
    from peftkernels.backends.triton.linear.routes import Product

PRODUCTS, STEPS = TOPICS = ("products", "steps")
# A limit counts from here: what is imported later takes seconds, too.
STARTED = time.perf_counter()
# What a model of the larger shape takes to build, to warm up and to time, at the least.
STEP_SECONDS = 25.0

EPILOG = """\
written to --out:
  questions-<gpu>.json   everything, from which `make report` makes the tables of docs/notes/gpu.md once it is kept in
                         bench/results/

exit codes: 0 done, 1 a result was wrong, 2 wrong input or no GPU
"""


@dataclass
class Answers:
    """What was found so far, as it is written."""

    products: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Clock:
    """Seconds that are left."""

    def __init__(self, limit: float | None, began: float) -> None:
        self._limit, self._began = limit, began

    def left(self) -> float:
        return float("inf") if self._limit is None else self._limit - (time.perf_counter() - self._began)


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """The command; returns its exit code. `--limit` counts from `started` (by `time.perf_counter`), else from now."""
    began = time.perf_counter() if started is None else started
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.questions",
        description="Measure what decides how the kernels go on: parts of a product, what a training step launches.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "topics", nargs="*", choices=[[], *TOPICS], metavar="TOPIC", help=f"{' or '.join(TOPICS)} (default: both)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the file")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds (default: as long as it takes)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --smoke alone")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that the code works")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        if not options.smoke:
            parser.error("--device: cpu is for --smoke alone, the questions are a GPU's")
        # Before the first import of Triton, which takes it then or never.
        os.environ["TRITON_INTERPRET"] = "1"
    # Before the first import of transformers: nothing may be looked up on the network.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from bench.gpu.device import DeviceError, find

    try:
        device = find(options.device)
    except DeviceError as error:
        print(f"bench.gpu.questions: error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    clock, answers = Clock(options.limit, began), Answers()
    topics = options.topics or list(TOPICS)
    facts = _facts(device)
    path = options.out / f"questions-{facts['slug']}.json"
    # Steps first: there are few, and products take whatever time there is.
    if STEPS in topics:
        _ask_steps(device, options.smoke, clock, answers)
    _write(path, facts, answers)
    if PRODUCTS in topics:
        _ask_products(device, options.smoke, clock, answers, lambda: _write(path, facts, answers))
    _print(path)
    return 1 if answers.wrong else 0


def _facts(device: Device) -> dict[str, Any]:
    from bench import results
    from bench.gpu import files

    return {
        "slug": results.slug(device.name),
        "origin": asdict(results.origin(device.name)),
        "environment": files.environment(device),
    }


def _ask_steps(device: Device, smoke: bool, clock: Clock, answers: Answers) -> None:
    import torch

    from bench.gpu.__main__ import missing
    from peftkernels.cli.timing import Effort

    for package in ("peft", "transformers"):
        reason = missing(package)
        if reason is not None:
            answers.left_out[STEPS] = f"{package} cannot be imported ({reason})"
            print(f"{STEPS}: left out, {answers.left_out[STEPS]}")
            return
    from bench.gpu.questions import steps

    dtype = torch.float32 if smoke else torch.bfloat16
    effort = Effort(0.0, 1, 0.1) if smoke else Effort(3.0, 7, 8.0)
    for shape in steps.SMOKE_SHAPES if smoke else steps.SHAPES:
        if clock.left() < STEP_SECONDS:
            answers.left_out[shape.title] = "time ran out"
            print(f"{shape.title}: left out, time ran out")
            continue
        try:
            found = steps.measure_steps(shape, device, dtype, effort, 1e-4 if smoke else 2e-2)
        except Exception as error:
            answers.wrong.append(f"{shape.title}: {type(error).__name__}: {error}")
            print(f"FAILED: {answers.wrong[-1]}")
            continue
        answers.steps.append(_step_record(found))
        times = "  ".join(f"{name} {ratio.median:.3f}" for name, ratio in found.ratios.items())
        print(f"{shape.title}: {found.frozen * 1e3:.2f} ms frozen; {times}", flush=True)


def _step_record(found: steps.Found) -> dict[str, Any]:
    return {
        "title": found.shape.title,
        "shape": asdict(found.shape),
        "frozen_us": found.frozen * 1e6,
        "rounds": found.rounds,
        "ratios": {name: asdict(ratio) for name, ratio in found.ratios.items()},
        "profiles": {name: asdict(one) for name, one in found.profiles.items()},
    }


def _ask_products(device: Device, smoke: bool, clock: Clock, answers: Answers, keep: Callable[[], None]) -> None:
    from bench.gpu import device as devices
    from bench.gpu.cases import MIDDLE_TOKENS, SHAPES
    from bench.gpu.questions import parts

    wanted = (
        parts.products(((64, 48),), (33,), "float16") if smoke else parts.products(SHAPES, MIDDLE_TOKENS, "bfloat16")
    )
    efforts = (parts.SMOKE, parts.SMOKE) if smoke else (parts.BRIEF, parts.LONG)
    failures = parts.Failures(answers.wrong, answers.refused)
    taken: list[float] = []
    for number, product in enumerate(wanted):
        began = time.perf_counter()
        # The first ones compile kernels and take long: the shortest of the last ones is what to expect.
        if clock.left() < min(taken[-3:], default=0.0):
            answers.left_out.update({_name(each): "time ran out" for each in wanted[number:]})
            print(f"time ran out: {len(wanted) - number} of {len(wanted)} products are left out")
            break
        try:
            found = parts.measure_product(product, device, failures, efforts, 1e-4 if smoke else 4e-3)
        except Exception as error:
            answers.wrong.append(f"{_name(product)}: {type(error).__name__}: {error}")
            print(f"FAILED: {answers.wrong[-1]}")
            keep()
            if not devices.answers(device):
                print("the device no longer answers")
                break
            continue
        answers.products.append(_product_record(found))
        taken.append(time.perf_counter() - began)
        keep()
        ratios = "  ".join(f"{name} {ratio.median:.3f}" for name, ratio in found.ratios.items())
        print(f"[{number + 1}/{len(wanted)}] {_name(product)}: {found.bare * 1e6:.1f} µs; {ratios}", flush=True)


def _product_record(found: parts.Found) -> dict[str, Any]:
    return {
        "product": asdict(found.product),
        "bare_us": found.bare * 1e6,
        "rounds": found.rounds,
        "ratios": {name: asdict(ratio) for name, ratio in found.ratios.items()},
    }


def _name(product: Product) -> str:
    return f"{product.direction} M={product.m} N={product.n} K={product.k} {product.dtype}"


def _write(path: Path, facts: dict[str, Any], answers: Answers) -> None:
    from demo.checkpoint import write_json

    write_json(path, {**{name: value for name, value in facts.items() if name != "slug"}, **asdict(answers)})


def _print(path: Path) -> None:
    from bench.gpu.questions import page

    print(page.page(json.loads(path.read_text())))
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
