"""Batches of similar length in an order that the seed decides, so that step t of every run sees the same batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Texts are sorted by length within groups of this many batches: enough to save padding, small enough to stay random.
BATCHES_PER_GROUP = 8


@dataclass(frozen=True)
class Encoded:
    """Token ids and class index of each document."""

    ids: list[list[int]]
    classes: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """``input_ids`` and ``attention_mask`` (batch, tokens) int64, ``labels`` (batch,) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the padded batch."""
        return self.input_ids.numel()

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model, labels included."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


def training_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the documents in each of ``steps`` batches; every epoch is shuffled anew and its remainder dropped.

    Args:
        lengths: tokens of each document; at least ``batch_size`` documents.
    """
    draw = random.Random(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = list(range(len(lengths)))
        draw.shuffle(order)
        order = order[: len(order) // batch_size * batch_size]
        epoch: list[list[int]] = []
        group_size = batch_size * BATCHES_PER_GROUP
        for start in range(0, len(order), group_size):
            group = sorted(order[start : start + group_size], key=lambda i: lengths[i])
            epoch.extend(group[i : i + batch_size] for i in range(0, len(group), batch_size))
        draw.shuffle(epoch)
        batches.extend(epoch)
    return batches[:steps]


def evaluation_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every document once, sorted by length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def collate(data: Encoded, indices: Sequence[int]) -> Batch:
    """The documents at ``indices``, padded to the longest of them."""
    width = max(len(data.ids[i]) for i in indices)
    ids = torch.full((len(indices), width), data.pad_id, dtype=torch.int64)
    mask = torch.zeros((len(indices), width), dtype=torch.int64)
    for row, i in enumerate(indices):
        ids[row, : len(data.ids[i])] = torch.tensor(data.ids[i], dtype=torch.int64)
        mask[row, : len(data.ids[i])] = 1
    return Batch(ids, mask, torch.tensor([data.classes[i] for i in indices], dtype=torch.int64))
