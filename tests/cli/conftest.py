"""A sentence encoder small enough to train in a test, and texts that it can tell apart."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

WORDS = [f"word{i}" for i in range(60)]
LABELS = ("alpha", "beta", "gamma")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer BERT of width 32, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    directory = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(directory)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 texts of 4 to 20 words; each label prefers words of its own."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with path.open("w") as file:
        for _ in range(240):
            label = draw.randrange(len(LABELS))
            own, common = WORDS[label * 10 : label * 10 + 10], WORDS[30:]
            words = [draw.choice(own if draw.random() < 0.7 else common) for _ in range(draw.randint(4, 20))]
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[label]}) + "\n")
    return path
