"""`python -m bench.peft_backend`: HF peft's models on peftkernels beside the same models on stock peft.

For LoRA, DoRA and AdaLoRA, each on MiniLM with the demo's texts and on a 4-layer Llama made from a configuration: the
relative error of the first step's gradients, how far the losses of 50 AdamW steps lie apart, how much faster the
patched training step is (allocation included; steps take turns), and what was served.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkernels
from peftkernels.cli.demo.batches import collate
from peftkernels.cli.demo.checkpoint import write_json
from peftkernels.cli.demo.options import Options
from peftkernels.cli.demo.prepare import prepare
from peftkernels.cli.demo.runs import copy_of_base
from peftkernels.cli.machine import machine, versions

KINDS = ("LoRA", "DoRA", "AdaLoRA")
# Steps that fill caches are not timed.
WARM_UP = 5
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One model under one kind of adapter.

    gradient_error  the largest ‖found − stock‖/‖stock‖ over all parameters, in the first step
    loss_distance   the largest difference of losses over all steps
    speed           median over steps of stock's time by the patched one's, with quartiles
    """

    model: str
    kind: str
    gradient_error: float
    loss_distance: float
    stock_milliseconds: float
    milliseconds: float
    speed: float
    speed_p25: float
    speed_p75: float
    served: int
    fell_back: int
    allocation_fell_back: int


def config(kind: str, steps: int, targets: Any, **more: Any) -> peft.PeftConfig:
    """The adapters; AdaLoRA's budget falls from 12 ranks to 8 during all but the first and the last tenth."""
    if kind == "AdaLoRA":
        schedule = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 10}
        return peft.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=48, target_modules=targets, **schedule, **more)
    return peft.LoraConfig(r=8, lora_alpha=16, use_dora=kind == "DoRA", target_modules=targets, **more)


def away_from_zero(model: Any) -> Any:
    """All factors drawn with a standard deviation of 0.05: with those that begin at zero half the gradients are."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, 0, 0.05)
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model


def minilm(kind: str, steps: int) -> tuple[Any, Iterator[Inputs]]:
    """The demo's classifier and batches."""
    prepared = prepare(Options(steps=steps), ())
    names = ["encoder." + name for name in prepared.start.adaptable]
    model = peft.get_peft_model(copy_of_base(prepared.start), config(kind, steps, names, modules_to_save=["head"]))
    return model, (collate(prepared.training, indices).inputs() for indices in prepared.order)


def llama(kind: str, steps: int) -> tuple[Any, Iterator[Inputs]]:
    """A causal language model with random weights, on random tokens."""
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "vocab_size": 4096}
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **shape))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, config(kind, steps, targets, task_type="CAUSAL_LM"))
    drawn = (torch.randint(4096, (2, 256)) for _ in range(steps))
    return model, ({"input_ids": ids, "labels": ids} for ids in drawn)


MODELS: dict[str, Callable[[str, int], tuple[Any, Iterator[Inputs]]]] = {"MiniLM": minilm, "Llama, 4 layers": llama}


class Training:
    """One of the two models that take turns."""

    def __init__(self, model: Any) -> None:
        # Past PeftModel.forward, which goes round AdaLoRA's orthogonality term where no task is given.
        self.model = model.base_model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.adaptive = hasattr(self.model, "update_and_allocate")
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def gradients(self, inputs: Inputs) -> list[Tensor]:
        """Of the loss, which is not kept."""
        return list(torch.autograd.grad(self.model(**inputs).loss, self.trained))

    def step(self, inputs: Inputs) -> None:
        """One whole training step, timed."""
        began = time.perf_counter()
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        if self.adaptive:
            self.model.update_and_allocate(len(self.losses) + 1)
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(float(loss.detach()))


def compare(title: str, kind: str, steps: int) -> Row:
    """Train both in turns."""
    torch.manual_seed(0)
    model, batches = MODELS[title](kind, steps)
    stock = away_from_zero(model.train())
    patched = copy.deepcopy(stock)
    peftkernels.apply_to_peft(patched, strict=True)
    trainings = [Training(stock), Training(patched)]
    error = 0.0
    for number, inputs in enumerate(batches):
        if number == 0:
            expected, found = (training.gradients(inputs) for training in trainings)
            error = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
        for training in trainings if number % 2 else trainings[::-1]:
            training.step(inputs)
    theirs, ours = (training.seconds[WARM_UP:] for training in trainings)
    p25, median, p75 = statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)
    counted = peftkernels.stats(patched)
    return Row(
        model=title,
        kind=kind,
        gradient_error=error,
        loss_distance=max(abs(a - b) for a, b in zip(*(training.losses for training in trainings), strict=True)),
        stock_milliseconds=1000 * statistics.median(theirs),
        milliseconds=1000 * statistics.median(ours),
        speed=median,
        speed_p25=p25,
        speed_p75=p75,
        served=counted.served,
        fell_back=counted.fell_back,
        allocation_fell_back=0 if counted.allocation is None else counted.allocation[1],
    )


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="training steps of each model (default 50)")
    parser.add_argument("--json", type=Path, help="a file for all figures, with versions and machine")
    options = parser.parse_args()
    rows = [compare(title, kind, options.steps) for title in MODELS for kind in KINDS]
    table = Table(title=f"HF peft on peftkernels and stock, {options.steps} steps, {torch.get_num_threads()} threads")
    for heading in (
        "model",
        "adapters",
        "gradients off by",
        "losses off by",
        "ms stock",
        "ms",
        "times as fast",
        "served",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "adapters") else "right")
    for row in rows:
        table.add_row(
            row.model,
            row.kind,
            f"{row.gradient_error:.1e}",
            f"{row.loss_distance:.1e}",
            f"{row.stock_milliseconds:.0f}",
            f"{row.milliseconds:.0f}",
            f"{row.speed:.2f} ({row.speed_p25:.2f}–{row.speed_p75:.2f})",
            f"{row.served} of {row.served + row.fell_back}",
        )
    Console().print(table)
    if options.json is not None:
        packages = versions(("torch", "peft", "transformers"))
        threads = torch.get_num_threads()
        facts = {"versions": packages, "machine": machine(), "threads": threads, "steps": options.steps}
        write_json(options.json, {**facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
