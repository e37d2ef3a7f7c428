"""One training from its first or a later step to its end, with checkpoints that a kill cannot damage."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from demo.batches import Batch, Encoded, collate, evaluation_order
from demo.checkpoint import Store
from demo.errors import InputError
from demo.runs import Run

STEPS_PER_CHECKPOINT = 10
EVALUATION_BATCH = 64


@dataclass
class Record:
    """What one training leaves behind.

    Attributes:
        losses: cross-entropy of each step.
        total_losses: what was differentiated, of each step.
        live_ranks: per step: ACTIVE ranks of each adapted module, in the order of ``modules``.
        milliseconds: wall time of each step in the training loop, undisturbed or not.
        halfway: the run's whole state after half of the steps, where its step time is measured.
    """

    name: str
    modules: list[str]
    losses: list[float] = field(default_factory=list)
    total_losses: list[float] = field(default_factory=list)
    live_ranks: list[list[int]] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    halfway: dict[str, Any] | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, list[bool]] = field(default_factory=dict)
    accuracy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return dict(vars(self))

    @classmethod
    def of(cls, content: Any, path: Path) -> Record:
        """The record that ``as_dict`` gave.

        Raises:
            InputError: ``content``, read from ``path``, is another thing.
        """
        nothing = type(None)
        kinds: dict[str, tuple[type, ...]] = {field.name: (list,) for field in fields(cls)}
        kinds.update(name=(str,), weights=(dict,), masks=(dict,), accuracy=(float, nothing), halfway=(dict, nothing))
        right = isinstance(content, dict) and content.keys() == kinds.keys()
        if not right or not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise InputError(f"--resume: {path}: holds no record of a training that is whole")
        return cls(**content)


def train(
    run: Run,
    order: Sequence[Sequence[int]],
    training: Encoded,
    test: Encoded,
    store: Store,
    advance: Callable[[int, float], None],
) -> Record:
    """Train ``run`` on the batches of ``order``, from the store's checkpoint where it has one for this run.

    Args:
        advance: called with the number of steps done and the latest loss.
    """
    record = Record(run.name, list(run.ranks()))
    checkpoint = store.load_training()
    if checkpoint is not None and checkpoint.get("name") == run.name:
        record = Record.of(checkpoint.get("record"), store.training_path)
        try:
            run.load_state_dict(checkpoint["run"])
            torch.set_rng_state(checkpoint["random"])
            advance(run.steps_done, record.losses[-1])
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise InputError(f"--resume: {store.training_path}: holds no training of {run.name}: {error}") from error
    run.log_decisions(store.decisions(run.name))
    while run.steps_done < len(order):
        started = time.perf_counter()
        task_loss, total_loss = run.step(collate(training, order[run.steps_done]))
        record.milliseconds.append(1e3 * (time.perf_counter() - started))
        record.losses.append(float(task_loss))
        record.total_losses.append(float(total_loss))
        ranks = run.ranks()
        record.live_ranks.append([sum(ranks[name]) for name in record.modules])
        if run.steps_done == max(1, len(order) // 2):
            record.halfway = copy.deepcopy(run.state_dict())
        if run.steps_done % STEPS_PER_CHECKPOINT == 0:
            if run.decisions is not None:
                run.decisions.sync()
            store.save_training(
                {
                    "name": run.name,
                    "record": record.as_dict(),
                    "run": run.state_dict(),
                    "random": torch.get_rng_state(),
                }
            )
        advance(run.steps_done, record.losses[-1])
    record.weights = {name: value.clone() for name, value in run.weights().items()}
    record.masks = run.ranks()
    record.accuracy = accuracy(run, test)
    if run.decisions is not None:
        run.decisions.sync()
        run.decisions.close()
    store.save_finished(run.name, record.as_dict())
    return record


@torch.no_grad()
def accuracy(run: Run, test: Encoded) -> float:
    """Share of the test documents whose largest logit is their class."""
    run.model.eval()
    right = 0
    for indices in evaluation_order([len(ids) for ids in test.ids], EVALUATION_BATCH):
        batch: Batch = collate(test, indices)
        logits = run.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        right += int((logits.argmax(-1) == batch.labels).sum())
    run.model.train()
    return right / len(test)
