"""AdaLoraCallback over our own layers, and in trl's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.trainer_runs import (
    BUDGET,
    INIT_R,
    STEPS,
    TARGET_R,
    TFINAL,
    TINIT,
    adalora_config,
    adalora_model,
    assert_equal,
    kept_ranks,
    pattern_of,
    tiny_llama,
    trained_parameters,
    trainer_for,
)

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.integrations.transformers import FROM_TRAINER, AdaLoraCallback
from peftkernels.nn import AdaLoRALinear


def _own_layers() -> tuple[Any, AdaLoraAllocator]:
    model = tiny_llama().requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, AdaLoRALinear.from_linear(getattr(layer.self_attn, name), INIT_R))
    allocator = AdaLoraAllocator(model, total_step=STEPS, target_r=TARGET_R, tinit=TINIT, tfinal=TFINAL)
    return model, allocator


@pytest.mark.parametrize("saved", [1, 5, 10])
@pytest.mark.filterwarnings("error:.*the allocator.*:UserWarning")
def test_own_layers_with_an_allocator(tmp_path: Path, saved: int) -> None:
    options = {"save_strategy": "steps", "save_steps": saved, "gradient_accumulation_steps": 2}
    ends = []
    for name in ("whole", "resumed"):
        model, allocator = _own_layers()
        trainer = trainer_for(tmp_path / name, model, AdaLoraCallback(allocator=allocator), **options)
        if name == "whole":
            trainer.train()
        else:
            # The folder is found where the Trainer writes its own checkpoints.
            (tmp_path / "whole").rename(tmp_path / "resumed")
            trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{saved}"))
        assert allocator.steps == STEPS and allocator.optimizer is None
        ends.append((trained_parameters(model), allocator.rank_pattern()))
    assert sum(map(sum, ends[0][1].values())) == BUDGET
    assert ends[0][1] == ends[1][1]
    for name, value in ends[0][0].items():
        assert torch.equal(ends[1][0][name], value), name


def test_own_layers_train_as_with_an_allocator_that_was_attached_by_hand(tmp_path: Path) -> None:
    class AddTerm(transformers.TrainerCallback):
        def __init__(self, allocator: AdaLoraAllocator) -> None:
            self.allocator = allocator

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.allocator.add_regularization_gradient()

    model, allocator = _own_layers()
    trainer_for(tmp_path, model, AdaLoraCallback(allocator=allocator)).train()
    by_hand, other = _own_layers()
    trainer = trainer_for(tmp_path, by_hand, AddTerm(other))
    other.attach(trainer.create_optimizer())
    trainer.train()
    assert_equal(model, by_hand)
    assert allocator.rank_pattern() == other.rank_pattern()


def test_an_allocator_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, allocator = _own_layers()
    with pytest.raises(ValueError, match=r"last allocation is at step 8, but the Trainer makes 5 optimizer steps"):
        trainer_for(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=5).train()
    with pytest.warns(UserWarning, match="found 12 in the allocator and 14 optimizer steps"):
        trainer_for(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=14).train()
    with pytest.raises(ValueError, match="found one that has made 14 steps"):
        trainer_for(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=14).train()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is made with tokenizers")
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(37))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("made_by_trl", [False, True])
def test_sft_trainer(tmp_path: Path, tokenizer: Any, made_by_trl: bool) -> None:
    """trl's trainer, with a peft model or with the configuration of one; and a resumed training of it."""
    trl = pytest.importorskip("trl", reason="the SFTTrainer needs trl installed")
    datasets = pytest.importorskip("datasets", reason="the SFTTrainer needs datasets installed")
    generator = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{i}" for i in torch.randint(0, 37, (6,), generator=generator).tolist()) for _ in range(48)]

    def trainer(folder: Path) -> Any:
        arguments = trl.SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            save_strategy="steps",
            save_steps=5,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=16,
            seed=3,
        )
        torch.manual_seed(5)
        return trl.SFTTrainer(
            model=tiny_llama() if made_by_trl else adalora_model(),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"text": rows}),
            processing_class=tokenizer,
            peft_config=adalora_config(total_step=FROM_TRAINER) if made_by_trl else None,
            callbacks=[AdaLoraCallback()],
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert kept_ranks(whole.model) == BUDGET
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_equal(resumed.model, whole.model)
    assert pattern_of(resumed.model) == pattern_of(whole.model)
