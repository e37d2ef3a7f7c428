"""`python -m bench.peft_backend`: HF peft's models on peftkernels beside the same models on stock peft.

For LoRA, DoRA and AdaLoRA, each on MiniLM with the demo's texts and on a 4-layer Llama made from a configuration: the
relative error of the first step's gradients, how far the losses of 50 AdamW steps lie apart, how much faster the
patched training step is (allocation included; steps take turns), and what was served. Then each with dropout in its
adapters, where the two drop other elements: speed and what was served alone, over 20 steps.

`--json` keeps all figures, by default as `bench/results/peft-backend-<machine>.json`, which `make report` makes the
page about HF peft from. The file has:

- `date, commit`: when, and of what
- `versions, machine`: of the packages and of what they ran on
- `threads`: of torch
- `rows`: what `Row` holds, by its names, for every training
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkernels
from bench.job import LINES_WIDTH
from bench.page_peft import HEADINGS, cells
from bench.report import RESULTS
from bench.results import commit, file_name
from demo.batches import collate
from demo.checkpoint import write_json
from demo.options import Options
from demo.prepare import prepare
from demo.runs import copy_of_base
from peftkernels.cli.load import ForeignLoad
from peftkernels.cli.machine import machine, versions
from peftkernels.cli.timing import FEWEST_ROUNDS, samples_of, spread, undisturbed

KINDS = ("LoRA", "DoRA", "AdaLoRA")
DROPOUTS = (0.0, 0.1)
# Enough for a speed, and there are no losses to compare.
MOST_STEPS_WITH_DROPOUT = 20
# Steps that fill caches are not timed.
WARM_UP = 5
STOCK, OURS = "stock", "peftkernels"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One model under one kind of adapter, trained for ``steps``.

    Attributes:
        dropout: of the adapters; above 0 the two models' gradients and losses cannot be compared.
        gradient_error: the largest ‖found − stock‖/‖stock‖ over all parameters, in the first step; None with dropout.
        loss_distance: the largest difference of losses over all steps; None with dropout.
        stock_milliseconds: median over the counted steps, as is ``milliseconds``, the patched one's.
        speed: median over these steps of stock's time by the patched one's, with quartiles.
        rounds: pairs of steps that count.
        discarded: those left out because other processes disturbed them.
        disturbed: most were disturbed: the times are not to be relied on.
        served: adapter calls of the patched model on our kernels.
        fell_back: those on peft's code.
        allocation_served: steps of AdaLoRA's own work on our kernels; None for the others.
        allocation_fell_back: those on peft's code; None for the others.
    """

    model: str
    kind: str
    dropout: float
    steps: int
    gradient_error: float | None
    loss_distance: float | None
    stock_milliseconds: float
    milliseconds: float
    speed: float
    speed_p25: float
    speed_p75: float
    rounds: int
    discarded: int
    disturbed: bool
    served: int
    fell_back: int
    allocation_served: int | None
    allocation_fell_back: int | None


def config(kind: str, dropout: float, steps: int, targets: Any, **more: Any) -> peft.PeftConfig:
    """The adapters; AdaLoRA's budget falls from 12 ranks to 8 during all but the first and the last tenth."""
    common = {"target_modules": targets, "lora_dropout": dropout, **more}
    if kind == "AdaLoRA":
        schedule = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 10}
        return peft.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=48, **schedule, **common)
    return peft.LoraConfig(r=8, lora_alpha=16, use_dora=kind == "DoRA", **common)


def away_from_zero(model: Any) -> Any:
    """All factors drawn with a standard deviation of 0.05: with those that begin at zero half the gradients are."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, 0, 0.05)
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model


def minilm(kind: str, dropout: float, steps: int) -> tuple[Any, Iterator[Inputs]]:
    """The demo's classifier and batches."""
    prepared = prepare(Options(steps=steps), ())
    names = ["encoder." + name for name in prepared.start.adaptable]
    adapters = config(kind, dropout, steps, names, modules_to_save=["head"])
    model = peft.get_peft_model(copy_of_base(prepared.start), adapters)
    return model, (collate(prepared.training, indices).inputs() for indices in prepared.order)


@dataclass(frozen=True)
class LlamaShape:
    """Widths and depth of the model, and how many tokens a step has."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    heads: int = 8
    vocabulary: int = 4096
    rows: int = 2
    tokens: int = 256


def llama(
    kind: str,
    dropout: float,
    steps: int,
    shape: LlamaShape = LlamaShape(),
) -> tuple[Any, Iterator[Inputs]]:
    """A causal language model with random weights, on random tokens."""
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 2,
            vocab_size=shape.vocabulary,
        )
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, config(kind, dropout, steps, targets, task_type="CAUSAL_LM"))
    drawn = (torch.randint(shape.vocabulary, (shape.rows, shape.tokens)) for _ in range(steps))
    return model, ({"input_ids": ids, "labels": ids} for ids in drawn)


Make = Callable[[str, float, int], tuple[Any, Iterator[Inputs]]]
MODELS: dict[str, Make] = {"MiniLM": minilm, "Llama, 4 layers": llama}


class Training:
    """One of the two models that take turns."""

    def __init__(self, model: Any) -> None:
        # Past PeftModel.forward, which goes round AdaLoRA's orthogonality term where no task is given.
        self.model = model.base_model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.adaptive = hasattr(self.model, "update_and_allocate")
        self.losses: list[float] = []

    def gradients(self, inputs: Inputs) -> list[Tensor]:
        """Of the loss, which is not kept."""
        return list(torch.autograd.grad(self.model(**inputs).loss, self.trained))

    def step(self, inputs: Inputs) -> float:
        """One whole training step; returns its seconds."""
        began = time.perf_counter()
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        if self.adaptive:
            self.model.update_and_allocate(len(self.losses) + 1)
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        self.losses.append(float(loss.detach()))
        return seconds


def gradient_error(stock: Training, patched: Training, inputs: Inputs) -> float:
    """The largest ‖found − stock‖/‖stock‖ over all trained parameters."""
    pairs = zip(patched.gradients(inputs), stock.gradients(inputs), strict=True)
    return largest((found - expected).norm() / expected.norm() for found, expected in pairs)


def largest(values: Iterable[Tensor | float]) -> float:
    """The largest value, NaN where one is: Python's max may lose it."""
    return float(torch.tensor([float(value) for value in values]).max())


def compare(title: str, kind: str, dropout: float, steps: int) -> Row:
    """Train both in turns."""
    torch.manual_seed(0)
    model, batches = MODELS[title](kind, dropout, steps)
    stock = away_from_zero(model.train())
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched)
    trainings = {STOCK: Training(stock), OURS: Training(patched)}
    error = None
    quiet: list[dict[str, float]] = []
    loud: list[dict[str, float]] = []
    for number, inputs in enumerate(batches):
        if number == 0 and not dropout:
            error = gradient_error(trainings[STOCK], trainings[OURS], inputs)
        with ForeignLoad() as load:
            turns = (STOCK, OURS) if number % 2 else (OURS, STOCK)
            seconds = {name: trainings[name].step(inputs) for name in turns}
        if number >= WARM_UP:
            (quiet if undisturbed(load.share) else loud).append(seconds)
    samples = samples_of(STOCK, quiet, loud, FEWEST_ROUNDS)
    speed = spread(samples.ratios(STOCK, OURS))
    losses = zip(trainings[STOCK].losses, trainings[OURS].losses, strict=True)
    counted = peftkernels.stats(patched)
    return Row(
        model=title,
        kind=kind,
        dropout=dropout,
        steps=steps,
        gradient_error=error,
        loss_distance=None if dropout else largest(abs(theirs - ours) for theirs, ours in losses),
        stock_milliseconds=1000 * statistics.median(samples.times(STOCK)),
        milliseconds=1000 * statistics.median(samples.times(OURS)),
        speed=speed.median,
        speed_p25=speed.p25,
        speed_p75=speed.p75,
        rounds=len(samples.rounds),
        discarded=samples.discarded,
        disturbed=samples.disturbed,
        served=counted.served,
        fell_back=counted.fell_back,
        allocation_served=None if counted.allocation is None else counted.allocation[0],
        allocation_fell_back=None if counted.allocation is None else counted.allocation[1],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peft_backend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="training steps of each model (default 50)")
    kept = RESULTS / f"peft-backend-{Path(file_name()).stem}.json"
    parser.add_argument(
        "--json", type=Path, nargs="?", const=kept, metavar="FILE", help=f"keep all figures (default: {kept.name})"
    )
    options = parser.parse_args(arguments)
    if options.steps < WARM_UP + FEWEST_ROUNDS:
        parser.error(f"--steps: found {options.steps}, expected at least {WARM_UP + FEWEST_ROUNDS}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json}: found no folder {options.json.parent}, expected one")
    measured = commit()
    cases = [(title, kind, dropout) for dropout in DROPOUTS for title in MODELS for kind in KINDS]
    few = min(options.steps, MOST_STEPS_WITH_DROPOUT)
    rows = [asdict(compare(*case, few if case[-1] else options.steps)) for case in cases]
    table = Table(title=f"HF peft on peftkernels and stock, {options.steps} steps, {torch.get_num_threads()} threads")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for row in rows:
        table.add_row(*cells(row))
    (Console() if sys.stdout.isatty() else Console(width=LINES_WIDTH)).print(table)
    if options.json is not None:
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": measured,
            "versions": versions(("torch", "peft", "transformers")),
            "machine": {name: fact for name, fact in machine().items() if name != "system"},
            "threads": torch.get_num_threads(),
        }
        write_json(options.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
