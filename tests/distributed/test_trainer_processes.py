"""AdaLoraCallback in a Trainer of two processes: each allocates alike, and as one process with both shares would."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from support.trainer_runs import BUDGET, adalora_model, kept_ranks, pattern_of, trained_parameters, trainer_for
from torch import Tensor

import peftkernels

Trained = tuple[Any, dict[str, Tensor]]


def train(folder: Path, rows: int, patched: bool) -> Trained:
    """The pattern and the parameters after a whole training, ``rows`` to a step in this process."""
    # Processes drop other elements than one would, and AdamW makes much of the rounding of small gradients.
    model = adalora_model(lora_dropout=0.0).double()
    if patched:
        peftkernels.apply_to_peft(model, strict=True)
    # Otherwise the Trainer takes the loss times the number of processes, and peft's orthogonality term with it.
    options = {"average_tokens_across_devices": False}
    trainer = trainer_for(folder, model, per_device_train_batch_size=rows, **options)
    trainer.train()
    assert kept_ranks(model) == BUDGET
    return pattern_of(model), trained_parameters(model)


def train_a_share(process: int, folder: Path, patched: bool) -> tuple[Trained, str]:
    """The same in one of several processes, and how accelerate calls them."""
    # What torchrun would say; the group is there already.
    here = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_PORT="0")
    from accelerate import PartialState

    try:
        trained = train(folder / str(process), rows=1, patched=patched)
        return trained, str(PartialState().distributed_type)
    finally:
        for name in (*here, "MASTER_PORT"):
            del os.environ[name]
        PartialState._reset_state()


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_two_processes_allocate_as_one(pair: Processes, tmp_path: Path, patched: bool) -> None:
    pattern, parameters = train(tmp_path / "alone", rows=2, patched=patched)
    answers = pair.run(train_a_share, tmp_path, patched)
    for (found, found_parameters), kind in answers:
        assert kind == "DistributedType.MULTI_CPU"
        assert found == pattern
        for name, expected in parameters.items():
            torch.testing.assert_close(found_parameters[name], expected, rtol=1e-6, atol=1e-9)
    (_, first), (_, second) = (trained for trained, _ in answers)
    assert all(torch.equal(first[name], second[name]) for name in first)
