"""AdaLoraCallback and checkpoints: a resumed training ends with the bits of one that was not interrupted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.trainer_runs import (
    BUDGET,
    INIT_R,
    LAST,
    MODULES,
    STEPS,
    Calls,
    Metric,
    RandomTexts,
    adalora_config,
    adalora_model,
    assert_equal,
    gates_of,
    kept_ranks,
    nonzero_gates,
    pattern_of,
    tiny_llama,
    trained_parameters,
    trainer_for,
    training_arguments,
)
from torch import Tensor

import peftkernels
from peftkernels.integrations.transformers import FROM_TRAINER, AdaLoraCallback
from peftkernels.integrations.transformers.checkpoint_state import STATE_NAME, read_checkpoint, read_state, write_state
from peftkernels.integrations.transformers.peft_training import PeftTraining


@pytest.mark.parametrize("delta", [1, 2])
@pytest.mark.parametrize("saved", [1, 5, LAST, 10])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, saved: int, delta: int) -> None:
    """Saved before the first mask, while the budget falls, at the last allocation and after it."""
    options = {"save_strategy": "steps", "save_steps": saved, "gradient_accumulation_steps": 2}
    whole = trainer_for(tmp_path / "whole", adalora_model(deltaT=delta), **options)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{saved}"
    assert (checkpoint / STATE_NAME).is_file()
    # Beside the whole one, so that the folder is found by what the Trainer loads and not by where it writes.
    resumed = trainer_for(tmp_path / "resumed", adalora_model(deltaT=delta), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(resumed.model, whole.model)
    assert pattern_of(resumed.model) == pattern_of(whole.model)
    assert kept_ranks(whole.model) == BUDGET


@pytest.mark.parametrize("saved", [5, LAST])
def test_a_patched_model_resumes_to_the_same_bits(tmp_path: Path, saved: int) -> None:
    """With the averages in the fused allocator's buffers."""
    options = {"save_strategy": "steps", "save_steps": saved}
    models = [adalora_model(), adalora_model()]
    for model in models:
        peftkernels.apply_to_peft(model, strict=True)
    whole = trainer_for(tmp_path / "whole", models[0], **options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", models[1], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
    assert_equal(resumed.model, whole.model)
    assert pattern_of(resumed.model) == pattern_of(whole.model)
    assert kept_ranks(whole.model) == BUDGET
    assert all(peftkernels.stats(model).fell_back == 0 for model in models)


def test_a_callback_added_later_finds_the_checkpoint_in_the_output_folder(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_for(tmp_path, **options)
    whole.train()
    resumed = transformers.Trainer(
        model=adalora_model(), args=training_arguments(tmp_path, **options), train_dataset=RandomTexts()
    )
    resumed.add_callback(AdaLoraCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(resumed.model, whole.model)


def test_the_folder_may_be_named_and_must_belong_to_what_was_loaded(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    other = trainer_for(tmp_path / "other", **options, learning_rate=1e-2)
    other.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"

    def resume(named: Path) -> Any:
        callback = AdaLoraCallback(resume_from_checkpoint=named)
        resumed = trainer_for(tmp_path / "resumed", callback=callback, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        return resumed

    assert_equal(resume(checkpoint).model, whole.model)
    with pytest.raises(ValueError, match=r"other parameters than the Trainer loaded .*values of model\.layers"):
        resume(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(ValueError, match=r"at step 10 in .*expected 'peft' at step 5"):
        resume(tmp_path / "whole" / "checkpoint-10")


def test_resuming_in_the_process_that_trained_to_the_end(tmp_path: Path) -> None:
    """The adapter has its pattern by then, to which peft cuts it before it loads."""
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    ended, pattern = trained_parameters(trainer.model), pattern_of(trainer.model)
    again = trainer_for(tmp_path, trainer.model, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in trained_parameters(again.model).items():
        assert torch.equal(value, ended[name]), name
    assert pattern_of(again.model) == pattern


def test_a_half_precision_adapter_resumes_to_the_bit(tmp_path: Path) -> None:
    """With what peft does not save: ranknum, which it trains on such a base."""

    def model() -> Any:
        base = tiny_llama().to(torch.bfloat16)
        torch.manual_seed(1)
        return peft.get_peft_model(base, adalora_config(), autocast_adapter_dtype=False)

    # A rate at which ranknum leaves its value in half precision.
    options = {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.1}
    whole = trainer_for(tmp_path / "whole", model(), **options)
    whole.train()
    assert any(float(value) != INIT_R for name, value in trained_parameters(whole.model).items() if "ranknum" in name)
    resumed = trainer_for(tmp_path / "resumed", model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert {value.dtype for name, value in trained_parameters(resumed.model).items() if "lora_" in name} == {
        torch.bfloat16
    }
    assert_equal(resumed.model, whole.model)


def test_a_checkpoint_without_state_is_refused_or_warned_about(tmp_path: Path) -> None:
    whole = trainer_for(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    for step in (5, 10):
        (tmp_path / "whole" / f"checkpoint-{step}" / STATE_NAME).unlink()

    def resume(step: int, how: str) -> Any:
        trainer = trainer_for(tmp_path / "resumed", callback=AdaLoraCallback(missing_state=how))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        return trainer

    with pytest.raises(ValueError, match=f"found no {STATE_NAME} in .*checkpoint-5, expected"):
        resume(5, "error")
    with pytest.warns(UserWarning, match="they begin anew"):
        assert kept_ranks(resume(5, "warn").model) == BUDGET
    with pytest.raises(ValueError, match=f"found no {STATE_NAME}"):
        resume(10, "warn")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=5).train()
    path = tmp_path / "checkpoint-5" / STATE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="found no readable safetensors file"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(path.parent))


def _damaged(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(what the error names, tensors, facts) with each part of a state missing or of another kind."""
    for name in ("kind", "step", "finalised", "rank_pattern", "settings"):
        yield name, tensors, {key: value for key, value in facts.items() if key != name}
        for wrong in (1.5, "x", [], [1], {"x": 1}, {"x": [True]}):
            if not (name == "kind" and wrong == "x"):
                yield name, tensors, {**facts, name: wrong}
    for name in facts["settings"]:
        yield name, tensors, {**facts, "settings": {k: v for k, v in facts["settings"].items() if k != name}}
    for name, kept in facts["rank_pattern"].items():
        for wrong in (None, kept[1:], [1] * len(kept)):
            yield name, tensors, {**facts, "rank_pattern": {**facts["rank_pattern"], name: wrong}}
    for name, tensor in tensors.items():
        bare = name.split(".", 1)[1]
        if "ranknum" not in name:
            yield bare, {key: value for key, value in tensors.items() if key != name}, facts
        for other in (torch.stack([tensor, tensor]), tensor.to(torch.int32)):
            yield bare, {**tensors, name: other}, facts
        yield "another", {**tensors, f"{name}.another": tensor}, facts


def test_a_state_with_anything_missing_or_wrong_is_refused_by_name(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=5).train()
    checkpoint = tmp_path / "checkpoint-5"
    tensors, facts = read_state(checkpoint)
    assert facts["rank_pattern"] is not None
    model = adalora_model()
    trainer = trainer_for(tmp_path / "other", model, save_strategy="steps", save_steps=5)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    training = PeftTraining(model)
    training.begin(None, STEPS, None, FROM_TRAINER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tried = 0
    for name, parts, said in _damaged(tensors, facts):
        tried += 1
        write_state(checkpoint, parts, said)
        with pytest.raises(ValueError, match=re.escape(name)):
            training.unpack(*read_checkpoint(checkpoint))
        assert training.pattern is None and not training.allocator.exp_avg_ipt
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert tried > 100


def test_checkpoints_load_into_plain_peft(tmp_path: Path) -> None:
    """In the middle of a training with every rank, at its end cut to the pattern; the same function both times."""
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=5, save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "cut"))
    tokens = RandomTexts()[0]["input_ids"][None]
    trainer.model.eval()
    expected = trainer.model(input_ids=tokens).logits
    sizes = {}
    for folder in ("cut", f"checkpoint-{STEPS}"):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
        sizes[folder] = sum(p.shape[0] for n, p in loaded.named_parameters() if "lora_E" in n)
    assert sizes == {"cut": BUDGET, f"checkpoint-{STEPS}": INIT_R * MODULES}


def test_rotation_keeps_the_state_of_what_is_left(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=2).train()
    folders = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint"))
    assert folders == ["checkpoint-12", "checkpoint-9"]
    for name in folders:
        assert read_state(tmp_path / name)[1]["step"] == int(name.removeprefix("checkpoint-"))
        assert [path.name for path in (tmp_path / name).glob(".*")] == []


@pytest.mark.parametrize(("best", "delta"), [(3, 1), (7, 2), (LAST, 1), (11, 1)])
def test_the_best_model_is_loaded_with_its_masks(tmp_path: Path, best: int, delta: int) -> None:
    losses = [0.0 if step == best else 1.0 for step in range(1, STEPS + 1)]
    seen = Calls()
    trainer = transformers.Trainer(
        model=adalora_model(deltaT=delta),
        args=training_arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="made_up",
            greater_is_better=False,
        ),
        train_dataset=RandomTexts(),
        eval_dataset=torch.utils.data.Subset(RandomTexts(), range(2)),
        compute_metrics=Metric(losses),
        callbacks=[AdaLoraCallback(), seen],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught]
    assert any("before the last allocation" in message for message in told) == (best < LAST)
    assert any("trained since" in message for message in told) == (best == 7)
    gates = gates_of(trainer.model)
    for name, value in seen.gates[best - 1].items():
        assert torch.equal(gates[name], value), name
    assert kept_ranks(trainer.model) == nonzero_gates(gates)
    trainer.save_model(str(tmp_path / "cut"))
    tokens = RandomTexts()[0]["input_ids"][None]
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut").eval()
    expected = trainer.model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
