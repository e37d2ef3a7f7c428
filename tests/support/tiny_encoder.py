"""A sentence encoder small enough to train in a test, and texts that it can tell apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [f"word{i}" for i in range(60)]
LABELS = ("alpha", "beta", "gamma")


def write_model(directory: Path) -> Path:
    """Fill `directory` with a random two-layer BERT of width 32 and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

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


def write_texts(path: Path) -> Path:
    """Write 240 texts of 4 to 20 words as JSON Lines; each label prefers words of its own."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(240):
            label = draw.randrange(len(LABELS))
            own, common = WORDS[label * 10 : label * 10 + 10], WORDS[30:]
            words = [draw.choice(own if draw.random() < 0.7 else common) for _ in range(draw.randint(4, 20))]
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[label]}) + "\n")
    return path
