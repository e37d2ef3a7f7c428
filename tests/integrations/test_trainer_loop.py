"""The allocator in HF's Trainer, attached to its optimizer: accumulation, checkpoints, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.nn import AdaLoRALinear

transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate installed")

STATE = "allocator.safetensors"
STEPS, ACCUMULATED, SAVED_AT = 12, 2, 6


class _Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 40, (8,), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.sum() % 3}


def _model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        for name in ("query", "value"):
            linear = getattr(layer.attention.self, name)
            setattr(layer.attention.self, name, AdaLoRALinear.from_linear(linear, 6))
    return model


class _Beside(transformers.TrainerCallback):
    """Keeps the allocator's state in the Trainer's checkpoints, adds its term and counts its steps."""

    def __init__(self, allocator: AdaLoraAllocator, folder: Path) -> None:
        self.allocator = allocator
        self.folder = folder
        self.steps: list[tuple[int, int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.allocator.add_regularization_gradient()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((state.global_step, self.allocator.steps))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_file(self.allocator.state_dict(), self.folder / f"checkpoint-{state.global_step}" / STATE)


def _trainer(folder: Path, **options: Any) -> tuple[Any, AdaLoraAllocator, _Beside]:
    model = _model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=SAVED_AT,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Data())
    allocator = AdaLoraAllocator(model, total_step=STEPS, target_r=2, tinit=2, tfinal=3, deltaT=2)
    beside = _Beside(allocator, folder)
    trainer.add_callback(beside)
    # The optimizer that accelerate wraps later, once training begins.
    trainer.create_optimizer()
    allocator.attach(trainer.optimizer)
    return trainer, allocator, beside


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name or "rank_" in name}


@pytest.mark.filterwarnings("error:.*the allocator.*:UserWarning")
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, allocator, beside = _trainer(tmp_path / "whole")
    whole.train()
    assert beside.steps == [(step, step) for step in range(1, STEPS + 1)]
    assert sum(map(sum, allocator.rank_pattern().values())) == 2 * 4
    assert type(whole.optimizer).__name__ == "AcceleratedOptimizer"
    assert allocator.optimizer is whole.optimizer.optimizer

    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED_AT}"
    resumed, other, beside = _trainer(tmp_path / "resumed")
    other.load_state_dict(load_file(checkpoint / STATE))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert beside.steps == [(step, step) for step in range(SAVED_AT + 1, STEPS + 1)]
    expected, found = _trained(whole.model), _trained(resumed.model)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert other.rank_pattern() == allocator.rank_pattern()
    states = allocator.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert losses[1] == losses[0]


def test_attaching_to_the_wrapped_optimizer_once_training_runs(tmp_path: Path) -> None:
    """In a callback, where the Trainer hands out what accelerate made of its optimizer."""
    trainer, allocator, beside = _trainer(tmp_path)
    allocator.detach()

    class Attach(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            allocator.attach(kwargs["optimizer"])

    trainer.add_callback(Attach())
    trainer.train()
    assert beside.steps == [(step, step) for step in range(1, STEPS + 1)]
    assert allocator.released
