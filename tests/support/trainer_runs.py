"""A tiny AdaLoRA model, HF's Trainer around it, and what to look at afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from peftkernels.integrations.transformers import AdaLoraCallback

STEPS, TINIT, TFINAL, INIT_R, TARGET_R = 12, 2, 4, 6, 2
LAST = STEPS - TFINAL
MODULES = 4  # q and v of two layers
BUDGET = TARGET_R * MODULES


class RandomTexts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def adalora_config(**options: Any) -> Any:
    settings = {"init_r": INIT_R, "target_r": TARGET_R, "tinit": TINIT, "tfinal": TFINAL, "total_step": STEPS}
    return peft.AdaLoraConfig(
        **{**settings, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    )


def adalora_model(**options: Any) -> Any:
    base = tiny_llama()
    torch.manual_seed(1)
    return peft.get_peft_model(base, adalora_config(**options))


def training_arguments(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**settings, **options})


def trainer_for(
    folder: Path, model: Any = None, callback: Any = None, more: tuple[Any, ...] = (), **options: Any
) -> Any:
    return transformers.Trainer(
        model=adalora_model() if model is None else model,
        args=training_arguments(folder, **options),
        train_dataset=RandomTexts(),
        eval_dataset=torch.utils.data.Subset(RandomTexts(), range(4)),
        callbacks=[AdaLoraCallback() if callback is None else callback, *more],
    )


class HandWritten(transformers.TrainerCallback):
    """What a careful user writes: the call on the optimizer itself, right behind its step, with a count of its own."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.masks: list[dict[str, list[bool]] | None] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner = kwargs["model"].base_model

        def after_step(optimizer: Any, *_: Any) -> None:
            self.calls.append(len(self.calls) + 1)
            tuner.update_and_allocate(self.calls[-1])
            self.masks.append(copy.deepcopy(tuner.peft_config["default"].rank_pattern))

        kwargs["optimizer"].optimizer.register_step_post_hook(after_step)


class Calls(transformers.TrainerCallback):
    """Records with which step peft is called, and how many ranks are alive after each of the Trainer's steps."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.gates: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner = kwargs["model"].base_model
        original = type(tuner).update_and_allocate

        def recording(step: int) -> None:
            self.calls.append(step)
            original(tuner, step)

        tuner.update_and_allocate = recording

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gates.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if "lora_E" in n})


def trained_parameters(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "ranknum" in n}


def gates_of(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in trained_parameters(model).items() if "lora_E" in name}


def assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = trained_parameters(found), trained_parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def pattern_of(model: Any) -> dict[str, list[bool]]:
    """The pattern of the trained adapter; peft shortens its names when it saves."""
    pattern = model.peft_config["default"].rank_pattern
    return {name.removesuffix(".default"): kept for name, kept in pattern.items()}


def kept_ranks(model: Any) -> int:
    return sum(map(sum, pattern_of(model).values()))


def nonzero_gates(gates: dict[str, Tensor]) -> int:
    return sum(int(gate.ne(0).sum()) for gate in gates.values())


class Metric(transformers.TrainerCallback):
    """Makes the evaluation losses what the test wants."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def __call__(self, predictions: Any) -> dict[str, float]:
        return {"made_up": self.losses.pop(0)}
