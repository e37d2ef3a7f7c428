"""From the demo's options to texts, model and batches: everything that is decided before the first step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peftkernels
from demo import data, model
from demo.batches import Encoded, training_order
from demo.errors import InputError
from demo.options import Options
from demo.recipe import PEFT_RUNS, RUN_NAMES, Recipe
from demo.requirements import has_peft
from demo.runs import Start

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Prepared:
    """The demo's inputs.

    Attributes:
        directory: where the encoder was loaded from.
        model_name: what adapters name as their base model.
        named: share of the texts that contain their label as a word.
        order: indices of the training texts in each step's batch.
        arguments: what decides the bits of the result; a resumed training must agree in all of it.
    """

    directory: Path
    model_name: str
    start: Start
    labels: tuple[str, ...]
    training: Encoded
    test: Encoded
    named: float
    order: list[list[int]]
    arguments: dict[str, Any]


def prepare(options: Options, runs: tuple[str, ...]) -> Prepared:
    """Read the texts, load the model, draw the split, the head and the batches.

    Raises:
        InputError: a path, a line or a number that cannot be used.
    """
    documents = data.read_jsonl(options.data) if options.data is not None else data.standard_library_documents()
    source = f"--data: {options.data}" if options.data is not None else "the standard library"
    documents = data.deduplicate(documents)
    if options.data is None:
        documents = data.select_modules(documents, options.seed)
    directory = model.model_directory(options.model)
    tokenizer = model.load_tokenizer(directory)
    encoder = model.load_encoder(directory)
    # Two different texts may begin with the same tokens, and these are all that the encoder is shown.
    ids = model.encode(tokenizer, encoder, [document.text for document in documents], options.max_tokens)
    shown = {document: tuple(row) for document, row in zip(documents, ids, strict=True)}
    split = data.split(data.deduplicate(documents, lambda document: shown[document]), options.seed, source)
    classes = {label: index for index, label in enumerate(split.labels)}
    training, test = (
        Encoded([list(shown[d]) for d in part], [classes[d.label] for d in part], tokenizer.pad_token_id or 0)
        for part in (split.train, split.test)
    )
    if len(training) < options.batch_size:
        raise InputError(
            f"--batch-size: found {options.batch_size}, expected at most {len(training)}, the number of training texts"
        )
    adaptable = model.adaptable_linears(encoder, f"--model: {directory}")
    torch.manual_seed(options.seed)
    base = model.TextClassifier(encoder, len(split.labels))
    recipe = Recipe(options.steps)
    return Prepared(
        directory=directory,
        model_name=MINILM if options.model is None else str(options.model),
        start=Start(base, adaptable, recipe, options.seed),
        labels=split.labels,
        training=training,
        test=test,
        named=data.name_share([*split.train, *split.test]),
        order=training_order([len(row) for row in training.ids], options.batch_size, options.steps, options.seed),
        arguments={
            "--seed": options.seed,
            "--steps": options.steps,
            "--batch-size": options.batch_size,
            "--max-tokens": options.max_tokens,
            "--runs": list(runs),
            "--threads": torch.get_num_threads(),
            "--model": f"{directory.name}, weights {model.fingerprint(encoder)}",
            "--data": f"{len(documents)} texts, {_fingerprint(training, test)}",
            "recipe": recipe.as_dict(),
            "peftkernels version": peftkernels.__version__,
            "torch version": torch.__version__,
        },
    )


def choose_runs(options: Options) -> tuple[tuple[str, ...], str | None]:
    """The runs that the options ask for and that can run, and a note where some were left out unasked.

    Raises:
        InputError: a run that was named cannot run.
    """
    installed = has_peft()
    wanted = options.runs or RUN_NAMES
    if options.no_peft or not installed:
        named = next((name for name in options.runs or () if name in PEFT_RUNS), None)
        if named is not None:
            reason = "--no-peft leaves it out" if options.no_peft else "peft is not installed"
            raise InputError(f"--runs: names {named}, but {reason}")
        wanted = tuple(name for name in wanted if name not in PEFT_RUNS)
    note = None if installed or options.no_peft else "peft is not installed: the comparison with it is left out"
    return wanted, note


def _fingerprint(*parts: Encoded) -> str:
    content = repr([(part.ids, part.classes) for part in parts])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
