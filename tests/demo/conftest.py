"""A tiny encoder and tiny texts on the disk, once for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_encoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer BERT of width 32, with its tokenizer."""
    return tiny_encoder.write_model(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 texts of 4 to 20 words; each label prefers words of its own."""
    return tiny_encoder.write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")
