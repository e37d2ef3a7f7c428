"""One training of the comparison of scales and learning rates: on the demo's task, with a validation part."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.adapter_growth import Growth, orthogonality_shares
from demo.batches import Encoded, collate, evaluation_order, training_order
from demo.model import TextClassifier
from demo.options import Options
from demo.prepare import prepare
from demo.recipe import Recipe
from demo.runs import AdaLoraRun, LoraRun, Run, Start, with_adapters
from demo.train import EVALUATION_BATCH
from peftkernels.allocation.run.orthogonality import orthogonality
from peftkernels.nn import AdaLoRALinear, LoRALinear

VALIDATION_SHARE = 0.2
# The last losses are averaged over about as many steps as an epoch has.
LAST_LOSSES = 20


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        rank: at the start.
        target: average rank at the end under AdaLoRA's allocator; equal to `rank` for gated layers of fixed rank; None
            for LoRA.
        lr: learning rate of the adapters at its peak.
        scale: what multiplies B·A or B·diag(E)·A.
        orth: weight of the orthogonality term.
        gate_lr: the gates' learning rate over `lr`.
    """

    rank: int
    target: int | None
    lr: float
    scale: float
    orth: float = 0.0
    gate_lr: float = 1.0
    seed: int = 0

    @property
    def adapter(self) -> str:
        """What is trained, without its settings."""
        if self.target is None:
            return f"LoRA r={self.rank}"
        return f"gated r={self.rank}" if self.target == self.rank else f"AdaLoRA {self.rank}→{self.target}"

    @property
    def key(self) -> str:
        """Name of the run's file."""
        kind = "lora" if self.target is None else f"adalora{self.target}"
        gate = "" if self.gate_lr == 1 else f"-gate{self.gate_lr:g}"
        orth = "" if self.target is None else f"-orth{self.orth:g}"
        return f"{kind}-r{self.rank}-lr{self.lr:g}-scale{self.scale:.3g}{orth}{gate}-seed{self.seed}"


@dataclass(frozen=True)
class Task:
    """The demo's task with the training texts divided once more: settings are chosen on the validation part."""

    start: Start
    training: Encoded
    validation: Encoded
    test: Encoded
    order: list[list[int]]


def load_task(options: Options) -> Task:
    """The demo's task for the options' seed; a fifth of every class's training texts becomes the validation part."""
    prepared = prepare(options, ("lora", "adalora"))
    by_class = defaultdict(list)
    for index, label in enumerate(prepared.training.classes):
        by_class[label].append(index)
    draw = random.Random(options.seed)
    held_out = [i for group in by_class.values() for i in draw.sample(group, round(VALIDATION_SHARE * len(group)))]
    kept = sorted(set(range(len(prepared.training))) - set(held_out))
    training = _part(prepared.training, kept)
    lengths = [len(row) for row in training.ids]
    return Task(
        start=prepared.start,
        training=training,
        validation=_part(prepared.training, sorted(held_out)),
        test=prepared.test,
        order=training_order(lengths, options.batch_size, options.steps, options.seed),
    )


class GatedRun(Run):
    """AdaLoRA's layers and orthogonality term with every rank live to the end."""

    def __init__(self, classifier: TextClassifier, recipe: Recipe) -> None:
        super().__init__("gated", classifier, classifier, recipe)
        self._weight = recipe.orthogonality_weight
        self._layers = [layer for layer in classifier.modules() if isinstance(layer, AdaLoRALinear)]

    def add_regularization(self, loss: Tensor) -> Tensor:
        A, B = [layer.lora_A for layer in self._layers], [layer.lora_B for layer in self._layers]
        return loss + orthogonality(A, B, self._weight)


def recipe_of(point: Point, demo: Recipe) -> Recipe:
    """The demo's recipe with the point's settings."""
    settings: dict[str, Any] = {
        "lora_learning_rate": point.lr,
        "adalora_learning_rate": point.lr,
        "orthogonality_weight": point.orth,
    }
    if point.target is None:
        settings.update(lora_rank=point.rank)
    else:
        settings.update(init_rank=point.rank, target_rank=point.target)
    return replace(demo, **settings)


def build(point: Point, start: Start) -> Run:
    """The run of `point` at its first step."""
    recipe = recipe_of(point, start.recipe)

    def adapt(linear: nn.Linear) -> nn.Module:
        layer = LoRALinear if point.target is None else AdaLoRALinear
        return layer.from_linear(linear, r=point.rank, lora_alpha=point.scale * point.rank)

    classifier = with_adapters(start, adapt)
    if point.target is None:
        return LoraRun("lora", classifier, recipe)
    if point.target == point.rank:
        run: Run = GatedRun(classifier, recipe)
    else:
        run = AdaLoraRun("adalora", classifier, recipe)
    if point.gate_lr != 1:
        _give_gates_their_own_rate(run, point.gate_lr, recipe)
    return run


def _give_gates_their_own_rate(run: Run, multiplier: float, recipe: Recipe) -> None:
    gates = {id(p) for name, p in run.model.named_parameters() if name.endswith("lora_E")}
    groups = []
    for group in run.optimizer.param_groups:
        others = [p for p in group["params"] if id(p) not in gates]
        own = [p for p in group["params"] if id(p) in gates]
        groups.append({"params": others, "lr": group["initial_lr"]})
        if own:
            groups.append({"params": own, "lr": group["initial_lr"] * multiplier})
    run.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, recipe.learning_rate_factor)
    if isinstance(run, AdaLoraRun):
        run.allocator.detach()
        run.allocator.attach(run.optimizer)


def measured_steps(steps: int) -> list[int]:
    """1, 2, 4, … and then every eighth of the training: where growth is measured."""
    doubling = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    return sorted({*doubling, *(max(1, steps * part // 8) for part in range(1, 9))})


def train_point(point: Point, task: Task) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train; returns what was measured, JSON values only, and the trained weights."""
    run = build(point, task.start)
    recipe = recipe_of(point, task.start.recipe)
    lengths = [len(ids) for ids in task.validation.ids]
    middle = evaluation_order(lengths, 32)
    growth = Growth(run, collate(task.validation, middle[len(middle) // 2]))
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    moved = 0.0
    wanted = set(measured_steps(len(task.order)))
    for step, indices in enumerate(task.order, start=1):
        moved += point.lr * recipe.learning_rate_factor(step - 1)
        shares: list[dict[str, float]] = []
        watch = point.target is not None and point.orth > 0 and step in wanted
        with orthogonality_shares(run, point.orth, shares) if watch else nullcontext():
            loss, _ = run.step(collate(task.training, indices))
        losses.append(float(loss))
        if step in wanted:
            term = {f"orthogonality_{name}": _finite(value) for name, value in shares[0].items()} if shares else {}
            # lr_sum is how far a parameter can come whose every step has the same sign
            curve.append({"step": step, "lr_sum": moved, **_all_finite(growth.measure()), **term})
    ranks = run.ranks()
    result = {
        "point": asdict(point),
        "adapter": point.adapter,
        "steps": len(task.order),
        "validation": evaluate(run.model, task.validation),
        "last_loss": _finite(statistics.fmean(losses[-LAST_LOSSES:])),
        "losses": [_finite(loss) for loss in losses],
        "live_ranks": sum(sum(mask) for mask in ranks.values()) if ranks else None,
        "growth": curve,
    }
    return result, {name: value.detach().clone() for name, value in run.weights().items()}


@torch.no_grad()
def evaluate(model: nn.Module, data: Encoded) -> dict[str, Any]:
    """Accuracy, and the mean cross-entropy in nats, over all texts; None where it is not finite."""
    model.eval()
    right, total = 0, 0.0
    for indices in evaluation_order([len(ids) for ids in data.ids], EVALUATION_BATCH):
        batch = collate(data, indices)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        right += int((logits.argmax(-1) == batch.labels).sum())
        total += float(nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
    model.train()
    return {"accuracy": right / len(data), "cross_entropy": _finite(total / len(data)), "texts": len(data)}


def evaluate_weights(point: Point, task: Task, weights: dict[str, Tensor]) -> dict[str, Any]:
    """`evaluate` on the test texts, of the run of `point` with the weights that `train_point` returned."""
    run = build(point, task.start)
    run.model.load_state_dict(weights, strict=False)
    return evaluate(run.model, task.test)


def _part(data: Encoded, indices: Sequence[int]) -> Encoded:
    return Encoded([data.ids[i] for i in indices], [data.classes[i] for i in indices], data.pad_id)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _all_finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items()}
