"""Batches: the same for every run of a seed, of similar length, complete."""

from __future__ import annotations

import random

import torch

from demo.batches import Encoded, collate, evaluation_order, training_order

LENGTHS = [random.Random(5).randint(3, 64) for _ in range(331)]


def test_order_depends_on_the_seed_alone() -> None:
    assert training_order(LENGTHS, 16, 50, seed=1) == training_order(LENGTHS, 16, 50, seed=1)
    assert training_order(LENGTHS, 16, 50, seed=1) != training_order(LENGTHS, 16, 50, seed=2)


def test_more_steps_continue_the_same_order() -> None:
    assert training_order(LENGTHS, 16, 30, seed=1) == training_order(LENGTHS, 16, 50, seed=1)[:30]


def test_no_text_comes_twice_in_an_epoch_and_batches_are_full() -> None:
    batches_per_epoch = len(LENGTHS) // 16
    order = training_order(LENGTHS, 16, 2 * batches_per_epoch, seed=1)
    assert {len(batch) for batch in order} == {16}
    for epoch in (order[:batches_per_epoch], order[batches_per_epoch:]):
        seen = [i for batch in epoch for i in batch]
        assert len(seen) == len(set(seen)) == 16 * batches_per_epoch
    assert order[:batches_per_epoch] != order[batches_per_epoch:]


def test_texts_of_a_batch_are_of_similar_length() -> None:
    order = training_order(LENGTHS, 16, 20, seed=1)
    padded = sum(16 * max(LENGTHS[i] for i in batch) for batch in order)
    used = sum(LENGTHS[i] for batch in order for i in batch)
    assert padded < 1.2 * used


def test_evaluation_visits_every_text_once() -> None:
    order = evaluation_order(LENGTHS, 64)
    assert sorted(i for batch in order for i in batch) == list(range(len(LENGTHS)))


def test_collate_pads_to_the_longest() -> None:
    data = Encoded([[5, 6], [7, 8, 9], [4]], [0, 2, 1], pad_id=1)
    batch = collate(data, [1, 2])
    assert batch.input_ids.tolist() == [[7, 8, 9], [4, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [2, 1]
    assert batch.tokens == 6
    assert batch.input_ids.dtype == torch.int64
