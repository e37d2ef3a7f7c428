"""HF peft's AdaLoRA in transformers' Trainer, on peftkernels' kernels and beside stock peft:

    python examples/peft_adalora_trainer.py              # a small Llama made from a configuration, nothing downloaded
    python examples/peft_adalora_trainer.py --model DIR  # a causal language model that save_pretrained() wrote

Needs `pip install 'peftkernels[hf]'`. AdaLoraCallback allocates the ranks in both trainings; without it the Trainer
trains AdaLoRA and never masks a rank. The trainings take turns of a few steps, each going on from its checkpoint: a
stop and a resume change nothing, and what else the machine does falls on both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, get_peft_model
from side_by_side import base_model, parser

import peftkernels
from peftkernels.integrations.transformers import FROM_TRAINER, AdaLoraCallback


class StepTimes(transformers.TrainerCallback):
    """How long each step of a training takes, from its first forward pass to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


class Stop(transformers.TrainerCallback):
    """Ends a training, with a checkpoint, after so many more steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._left -= 1
        if self._left == 0:
            control.should_save = control.should_training_stop = True


def train(model: Any, options: Any, folder: Path, texts: Sequence[Any], turn: int, times: StepTimes) -> None:
    """A turn of a training: from its checkpoint, where there is one, for `turn` steps."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    callbacks = [AdaLoraCallback(), times, Stop(turn)]
    trainer = transformers.Trainer(model, arguments, train_dataset=texts, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    config = AdaLoraConfig(
        init_r=options.rank,
        target_r=max(1, options.rank // 2),
        lora_alpha=4 * options.rank,
        lora_dropout=options.dropout,
        orth_reg_weight=0.1,
        tinit=1,
        tfinal=options.steps // 3,
        total_step=FROM_TRAINER,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    models: dict[str, Any] = {}
    for name in ("stock peft", "peftkernels"):
        torch.manual_seed(0)
        models[name] = get_peft_model(base_model(options.model), config)
    print(peftkernels.apply_to_peft(models["peftkernels"]), "\n")

    vocabulary = models["stock peft"].get_input_embeddings().num_embeddings
    drawn = torch.randint(vocabulary, (2 * options.steps, options.tokens))
    texts = [{"input_ids": ids, "labels": ids} for ids in drawn]
    times = {name: StepTimes() for name in models}
    turn = max(1, options.steps // 4)
    # Every turn but the last ends a training early on purpose.
    warnings.filterwarnings("ignore", message="training leaves the adapter as it was")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(0, options.steps, turn):
            for name in sorted(models, reverse=bool(number // turn % 2)):
                left = min(turn, options.steps - number)
                train(models[name], options, Path(folder, name.replace(" ", "-")), texts, left, times[name])

    medians = {name: statistics.median(each.seconds) for name, each in times.items()}
    for name, model in models.items():
        kept = sum(map(sum, model.peft_config["default"].rank_pattern.values()))
        print(f"{name}: {1000 * medians[name]:.0f} ms a step, {kept} ranks kept at the end")
    print(f"peftkernels is {medians['stock peft'] / medians['peftkernels']:.2f} times as fast")
    print(peftkernels.stats(models["peftkernels"]))


if __name__ == "__main__":
    main()
