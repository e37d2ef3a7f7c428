"""Whole training steps of a model: forward, loss, backward, optimizer, rank allocation.

The frozen step is the same model's forward and backward pass with every parameter frozen; the gradient runs through it
from the loss to the embeddings' output. Both as in `python -m demo`, on batches of random tokens.
"""

from __future__ import annotations

import functools
import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import lineup
from bench.cases import Case
from bench.verify import WrongResultError
from demo.batches import Batch
from demo.builders import build
from demo.model import TextClassifier, adaptable_linears, load_encoder, model_directory
from demo.recipe import Recipe
from demo.runs import Run, Start
from demo.saved import bytes_saved_for_backward
from demo.timing import FrozenStep, TimedRun

RUNS = {
    lineup.OURS_LORA: "lora",
    lineup.OURS_ADALORA: "adalora",
    lineup.PEFT_LORA: "peft-lora",
    lineup.PEFT_ADALORA: "peft-adalora",
}
CLASSES = 20
BATCHES = 4
SEQUENCES = {"minilm": 32, "llama": 4}
# AdaLoRA is timed while its budget falls, its dearest phase: from step WARM_STEPS on, halfway down, to step LAST_STEP.
RECIPE = Recipe(steps=20)
WARM_STEPS = 7
LAST_STEP = RECIPE.steps - RECIPE.tfinal - 1
MOST_LOSS_DIFFERENCE = 1e-3
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "use_cache": False,
}


@functools.lru_cache(maxsize=1)
def load_model(name: str) -> nn.Module:
    """all-MiniLM-L6-v2 with its pretrained weights, or a small Llama with random ones; frozen, float32."""
    # Before the first import of transformers: nothing may be looked up on the network.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from transformers import LlamaConfig, LlamaModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name == "minilm":
        return load_encoder(model_directory(None))
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**LLAMA)).requires_grad_(False)


class TrainingBench:
    """The frozen step and four trainings of one model, from the same start on the same batches."""

    baseline = lineup.FROZEN

    def __init__(self, case: Case) -> None:
        self.case = case
        encoder = load_model(case.model)
        linears = adaptable_linears(encoder, case.model)
        if not 1 <= case.modules <= len(linears):
            raise ValueError(f"{case.id}: found {case.modules} modules, expected 1 to {len(linears)}")
        # Spread over the depth, the first one always among them: backward goes all the way down in each case.
        adapted = [linears[i * len(linears) // case.modules] for i in range(case.modules)]
        torch.manual_seed(1)
        base = TextClassifier(encoder, CLASSES)
        vocabulary = int(cast(Any, encoder).config.vocab_size)
        self.batches = [self._batch(seed, vocabulary) for seed in range(BATCHES)]
        start = Start(base, adapted, RECIPE, seed=2)
        self._frozen = FrozenStep(base)
        self._runs: dict[str, Run] = {name: build(run, start) for name, run in RUNS.items()}
        self._losses = {name: self._warm(run) for name, run in self._runs.items()}
        self.contestants: dict[str, FrozenStep | TimedRun] = {lineup.FROZEN: self._frozen}
        for name, run in self._runs.items():
            self.contestants[name] = TimedRun(run, run.state_dict(), LAST_STEP)

    def _batch(self, seed: int, vocabulary: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        rows = SEQUENCES[self.case.model]
        shape = (rows, self.case.M // rows)
        ids = torch.randint(5, vocabulary, shape, generator=generator)
        return Batch(ids, torch.ones_like(ids), torch.randint(CLASSES, (rows,), generator=generator))

    def _warm(self, run: Run) -> list[float]:
        return [float(run.step(self.batches[step % BATCHES])[1]) for step in range(WARM_STEPS)]

    def prepare(self, name: str) -> None:
        """Rewind a training that would leave the phase that is timed."""
        contestant = self.contestants[name]
        if isinstance(contestant, TimedRun):
            contestant.rewind()

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` steps, on the batches from number `first` on."""
        contestant = self.contestants[name]
        for i in range(first, first + repeats):
            contestant.step(self.batches[i % BATCHES])

    def saved_bytes(self, name: str) -> int:
        """Bytes that the forward pass and the loss keep for backward, beside parameters and buffers."""
        if name == lineup.FROZEN:
            model: nn.Module = self._frozen.model

            def forward() -> Tensor:
                return self._frozen.loss(self.batches[0])
        else:
            run = self._runs[name]
            model = run.model

            def forward() -> Tensor:
                return run.forward(self.batches[0])[1]

        return bytes_saved_for_backward(forward, [*model.parameters(), *model.buffers()])

    def verify(self) -> None:
        """Ours and peft's losses agree over the first steps from the same start; raises WrongResultError."""
        for ours, theirs in ((lineup.OURS_LORA, lineup.PEFT_LORA), (lineup.OURS_ADALORA, lineup.PEFT_ADALORA)):
            for step, (a, b) in enumerate(zip(self._losses[ours], self._losses[theirs], strict=True)):
                if not abs(a - b) <= MOST_LOSS_DIFFERENCE * abs(b):
                    raise WrongResultError(
                        f"{self.case.id}: {ours}'s loss is {a:.6g} in step {step + 1}, {theirs}'s {b:.6g}; "
                        "nothing was timed"
                    )
