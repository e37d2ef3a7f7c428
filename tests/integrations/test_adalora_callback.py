"""AdaLoraCallback in HF's Trainer and in trl's: the right step and schedule, checkpoints that go on to the bit."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the callback needs transformers installed")
peft = pytest.importorskip("peft", reason="the callback needs peft installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate installed")

from peftkernels.allocation import AdaLoraAllocator  # noqa: E402 (behind the skips)
from peftkernels.integrations.checkpoint_state import STATE_NAME, read_state  # noqa: E402
from peftkernels.integrations.transformers import FROM_TRAINER, AdaLoraCallback  # noqa: E402
from peftkernels.nn import AdaLoRALinear  # noqa: E402

STEPS, TINIT, TFINAL, INIT_R, TARGET_R = 12, 2, 4, 6, 2
LAST = STEPS - TFINAL
MODULES = 4  # q and v of two layers
BUDGET = TARGET_R * MODULES


class _Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def _base() -> nn.Module:
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


def _config(**options: Any) -> Any:
    settings = {"init_r": INIT_R, "target_r": TARGET_R, "tinit": TINIT, "tfinal": TFINAL, "total_step": STEPS}
    return peft.AdaLoraConfig(
        **{**settings, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    )


def _model(**options: Any) -> Any:
    base = _base()
    torch.manual_seed(1)
    return peft.get_peft_model(base, _config(**options))


def _arguments(folder: Path, **options: Any) -> Any:
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


def _trainer(folder: Path, model: Any = None, callback: Any = None, more: tuple[Any, ...] = (), **options: Any) -> Any:
    return transformers.Trainer(
        model=_model() if model is None else model,
        args=_arguments(folder, **options),
        train_dataset=_Data(),
        eval_dataset=torch.utils.data.Subset(_Data(), range(4)),
        callbacks=[AdaLoraCallback() if callback is None else callback, *more],
    )


class _HandWritten(transformers.TrainerCallback):
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


class _Calls(transformers.TrainerCallback):
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


def _trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "ranknum" in n}


def _gates(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in _trained(model).items() if "lora_E" in name}


def _assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = _trained(found), _trained(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def _pattern(model: Any) -> dict[str, list[bool]]:
    """The pattern of the trained adapter; peft shortens its names when it saves."""
    pattern = model.peft_config["default"].rank_pattern
    return {name.removesuffix(".default"): kept for name, kept in pattern.items()}


def _kept(model: Any) -> int:
    return sum(map(sum, _pattern(model).values()))


def _live(gates: dict[str, Tensor]) -> int:
    return sum(int(gate.ne(0).sum()) for gate in gates.values())


@pytest.mark.parametrize(("accumulated", "clipped"), [(1, 1.0), (3, 0.05), (1, 0.0)])
def test_masks_equal_those_of_a_loop_that_calls_peft_after_the_optimizer(
    tmp_path: Path, accumulated: int, clipped: float
) -> None:
    options = {"gradient_accumulation_steps": accumulated, "max_grad_norm": clipped}
    calls, hand = _Calls(), _HandWritten()
    ours = _trainer(tmp_path / "ours", more=(calls,), **options)
    ours.train()
    theirs = _trainer(tmp_path / "theirs", callback=hand, **options)
    theirs.train()
    assert calls.calls == hand.calls == list(range(1, STEPS + 1))
    assert _kept(ours.model) == BUDGET
    assert _live(calls.gates[-1]) == BUDGET
    assert _live(calls.gates[TINIT - 1]) == INIT_R * MODULES
    assert _pattern(ours.model) == _pattern(theirs.model)
    for gates, masks in zip(calls.gates, hand.masks, strict=True):
        assert _live(gates) == (INIT_R * MODULES if masks is None else sum(map(sum, masks.values())))
    _assert_equal(ours.model, theirs.model)


def test_clipping_changes_the_masks_by_the_clipped_gradient(tmp_path: Path) -> None:
    """The scores are of the clipped gradient: with clipping their averages are smaller."""
    sizes = []
    for norm in (0.0, 1e-3):
        trainer = _trainer(tmp_path, max_steps=4, max_grad_norm=norm, callback=AdaLoraCallback(total_step=STEPS))
        with pytest.warns(UserWarning, match="last allocation, at step 8, is not reached"):
            trainer.train()
        averages = trainer.model.base_model.rankallocator.exp_avg_ipt
        sizes.append(sum(float(value.sum()) for value in averages.values()))
    assert 0 < sizes[1] < 0.1 * sizes[0]


@pytest.mark.parametrize("delta", [1, 2])
@pytest.mark.parametrize("saved", [1, 5, LAST, 10])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, saved: int, delta: int) -> None:
    """Saved before the first mask, while the budget falls, at the last allocation and after it."""
    options = {"save_strategy": "steps", "save_steps": saved, "gradient_accumulation_steps": 2}
    whole = _trainer(tmp_path / "whole", _model(deltaT=delta), **options)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{saved}"
    assert (checkpoint / STATE_NAME).is_file()
    # Beside the whole one, so that the folder is found by what the Trainer loads and not by where it writes.
    resumed = _trainer(tmp_path / "resumed", _model(deltaT=delta), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    _assert_equal(resumed.model, whole.model)
    assert _pattern(resumed.model) == _pattern(whole.model)
    assert _kept(whole.model) == BUDGET


def test_a_callback_added_later_finds_the_checkpoint_in_the_output_folder(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = _trainer(tmp_path, **options)
    whole.train()
    resumed = transformers.Trainer(model=_model(), args=_arguments(tmp_path, **options), train_dataset=_Data())
    resumed.add_callback(AdaLoraCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    _assert_equal(resumed.model, whole.model)


def test_the_folder_may_be_named_and_must_belong_to_what_was_loaded(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    other = _trainer(tmp_path / "other", **options, learning_rate=1e-2)
    other.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"

    def resume(named: Path) -> Any:
        callback = AdaLoraCallback(resume_from_checkpoint=named)
        resumed = _trainer(tmp_path / "resumed", callback=callback, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        return resumed

    _assert_equal(resume(checkpoint).model, whole.model)
    with pytest.raises(ValueError, match=r"other parameters than the Trainer loaded .*values of model\.layers"):
        resume(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(ValueError, match=r"at step 10 in .*expected 'peft' at step 5"):
        resume(tmp_path / "whole" / "checkpoint-10")


def test_resuming_in_the_process_that_trained_to_the_end(tmp_path: Path) -> None:
    """The adapter has its pattern by then, to which peft cuts it before it loads."""
    trainer = _trainer(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    ended, pattern = _trained(trainer.model), _pattern(trainer.model)
    again = _trainer(tmp_path, trainer.model, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in _trained(again.model).items():
        assert torch.equal(value, ended[name]), name
    assert _pattern(again.model) == pattern


def test_a_half_precision_adapter_resumes_to_the_bit(tmp_path: Path) -> None:
    """With what peft does not save: ranknum, which it trains on such a base."""

    def model() -> Any:
        base = _base().to(torch.bfloat16)
        torch.manual_seed(1)
        return peft.get_peft_model(base, _config(), autocast_adapter_dtype=False)

    # A rate at which ranknum leaves its value in half precision.
    options = {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.1}
    whole = _trainer(tmp_path / "whole", model(), **options)
    whole.train()
    assert any(float(value) != INIT_R for name, value in _trained(whole.model).items() if "ranknum" in name)
    resumed = _trainer(tmp_path / "resumed", model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert {value.dtype for name, value in _trained(resumed.model).items() if "lora_" in name} == {torch.bfloat16}
    _assert_equal(resumed.model, whole.model)


def test_a_checkpoint_without_state_is_refused_or_warned_about(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    for step in (5, 10):
        (tmp_path / "whole" / f"checkpoint-{step}" / STATE_NAME).unlink()

    def resume(step: int, how: str) -> Any:
        trainer = _trainer(tmp_path / "resumed", callback=AdaLoraCallback(missing_state=how))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        return trainer

    with pytest.raises(ValueError, match=f"found no {STATE_NAME} in .*checkpoint-5, expected"):
        resume(5, "error")
    with pytest.warns(UserWarning, match="they begin anew"):
        assert _kept(resume(5, "warn").model) == BUDGET
    with pytest.raises(ValueError, match=f"found no {STATE_NAME}"):
        resume(10, "warn")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    path = tmp_path / "checkpoint-5" / STATE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="found no readable safetensors file"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_checkpoints_load_into_plain_peft(tmp_path: Path) -> None:
    """In the middle of a training with every rank, at its end cut to the pattern; the same function both times."""
    trainer = _trainer(tmp_path, save_strategy="steps", save_steps=5, save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "cut"))
    tokens = _Data()[0]["input_ids"][None]
    trainer.model.eval()
    expected = trainer.model(input_ids=tokens).logits
    sizes = {}
    for folder in ("cut", f"checkpoint-{STEPS}"):
        loaded = peft.PeftModel.from_pretrained(_base(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
        sizes[folder] = sum(p.shape[0] for n, p in loaded.named_parameters() if "lora_E" in n)
    assert sizes == {"cut": BUDGET, f"checkpoint-{STEPS}": INIT_R * MODULES}


def test_rotation_keeps_the_state_of_what_is_left(tmp_path: Path) -> None:
    _trainer(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=2).train()
    folders = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint"))
    assert folders == ["checkpoint-12", "checkpoint-9"]
    for name in folders:
        assert read_state(tmp_path / name)[1]["step"] == int(name.removeprefix("checkpoint-"))
        assert [path.name for path in (tmp_path / name).glob(".*")] == []


class _Metric(transformers.TrainerCallback):
    """Makes the evaluation losses what the test wants."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def __call__(self, predictions: Any) -> dict[str, float]:
        return {"made_up": self.losses.pop(0)}


@pytest.mark.parametrize(("best", "delta"), [(3, 1), (7, 2), (LAST, 1), (11, 1)])
def test_the_best_model_is_loaded_with_its_masks(tmp_path: Path, best: int, delta: int) -> None:
    losses = [0.0 if step == best else 1.0 for step in range(1, STEPS + 1)]
    seen = _Calls()
    trainer = transformers.Trainer(
        model=_model(deltaT=delta),
        args=_arguments(
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
        train_dataset=_Data(),
        eval_dataset=torch.utils.data.Subset(_Data(), range(2)),
        compute_metrics=_Metric(losses),
        callbacks=[AdaLoraCallback(), seen],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught]
    assert any("before the last allocation" in message for message in told) == (best < LAST)
    assert any("trained since" in message for message in told) == (best == 7)
    gates = _gates(trainer.model)
    for name, value in seen.gates[best - 1].items():
        assert torch.equal(gates[name], value), name
    assert _kept(trainer.model) == _live(gates)
    trainer.save_model(str(tmp_path / "cut"))
    tokens = _Data()[0]["input_ids"][None]
    loaded = peft.PeftModel.from_pretrained(_base(), tmp_path / "cut").eval()
    expected = trainer.model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)


def test_early_stop_and_evaluation_keep_the_masks(tmp_path: Path) -> None:
    # Without dropout: an evaluation draws from the generator that dropout draws from.
    whole = _Calls()
    _trainer(tmp_path / "whole", _model(lora_dropout=0.0), more=(whole,)).train()
    stopped = _Calls()
    trainer = transformers.Trainer(
        model=_model(lora_dropout=0.0),
        args=_arguments(
            tmp_path / "stopped",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=False,
            metric_for_best_model="made_up",
            greater_is_better=False,
        ),
        train_dataset=_Data(),
        eval_dataset=torch.utils.data.Subset(_Data(), range(4)),
        compute_metrics=_Metric([0.5, 0.4, 0.3, 0.9, 0.9, 0.9]),
        callbacks=[AdaLoraCallback(), transformers.EarlyStoppingCallback(early_stopping_patience=3), stopped],
    )
    with pytest.warns(UserWarning, match="as it was after step 6, before the last allocation at step 8"):
        trainer.train()
    assert stopped.calls == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(stopped.gates, whole.gates, strict=False):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert _kept(trainer.model) == _live(whole.gates[5])


class _Overflow(transformers.TrainerCallback):
    """Gives the optimizer a GradScaler, as fp16 training has, and makes gradients overflow at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate.optimizer import patch_optimizer_step

        wrapped = kwargs["optimizer"]
        wrapped.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=0.999, growth_interval=1000)
        # What the backward pass does that scales the loss; the scaler wants to have seen it.
        wrapped.scaler.scale(torch.ones(()))
        wrapped._accelerate_step_called = False
        wrapped._optimizer_original_step_method = wrapped.optimizer.step
        wrapped._optimizer_patched_step_method = patch_optimizer_step(wrapped, wrapped.optimizer.step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            next(p for n, p in kwargs["model"].named_parameters() if "lora_A" in n).grad.fill_(float("inf"))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("skipped", [(1,), (4, 5), (LAST,), (STEPS,)])
def test_a_skipped_step_allocates_nothing(tmp_path: Path, optimizer: str, skipped: tuple[int, ...]) -> None:
    calls = _Calls()
    trainer = _trainer(tmp_path, more=(_Overflow(*skipped), calls), optim=optimizer)
    trainer.train()
    expected = [step for step in range(1, STEPS + 1) if step not in skipped]
    if skipped == (LAST,):
        # The step after makes up for the last allocation.
        expected[expected.index(LAST + 1)] = LAST
    assert calls.calls == expected
    for step in skipped[:1] if skipped[0] > 1 else ():
        for name, value in calls.gates[step - 2].items():
            assert torch.equal(calls.gates[step - 1][name], value), name
    assert _kept(trainer.model) == BUDGET == _live(calls.gates[-1])
    assert all(bool(value.isfinite().all()) for value in _trained(trainer.model).values())


def test_the_last_allocation_is_made_up_for_where_the_last_step_is_skipped(tmp_path: Path) -> None:
    calls = _Calls()
    trainer = _trainer(tmp_path, _model(tinit=STEPS - 2, tfinal=0), more=(_Overflow(STEPS), calls))
    trainer.train()
    assert _live(calls.gates[-1]) > BUDGET
    assert _kept(trainer.model) == BUDGET == _live(_gates(trainer.model))


def test_total_steps_come_from_the_trainer(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _model(total_step=500))
    with pytest.warns(UserWarning, match="found 500 in the AdaLoraConfig and 12 optimizer steps in the Trainer"):
        trainer.train()
    assert trainer.model.peft_config["default"].total_step == STEPS
    assert _kept(trainer.model) == BUDGET


@pytest.mark.parametrize("found", [FROM_TRAINER, None])
def test_a_placeholder_is_replaced_in_silence(tmp_path: Path, found: int | None) -> None:
    model = _model(total_step=FROM_TRAINER)
    model.peft_config["default"].total_step = found
    # Counted in epochs: 160 rows in batches of 2, 5 accumulated, are 16 steps.
    trainer = _trainer(tmp_path, model, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(total_step|allocation).*")
        trainer.train()
    assert model.peft_config["default"].total_step == 16
    assert _kept(model) == BUDGET


def test_a_given_total_step_wins(tmp_path: Path) -> None:
    calls = _Calls()
    trainer = _trainer(tmp_path, callback=AdaLoraCallback(total_step=10), more=(calls,))
    trainer.train()
    assert trainer.model.peft_config["default"].total_step == 10
    assert [_live(gates) for gates in calls.gates[5:]] == [BUDGET] * 7


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    """Without the averages and the pattern of one that ended before its last allocation."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    found: list[tuple[int, object]] = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tuner = kwargs["model"].base_model
            found.append((len(tuner.rankallocator.exp_avg_ipt), tuner.peft_config["default"].rank_pattern))

    calls = _Calls()
    trainer = _trainer(tmp_path, _model(tinit=0), more=(Look(), calls, Stop()))
    with pytest.warns(UserWarning, match="as it was after step 1"):
        trainer.train()
    assert trainer.model.base_model.rankallocator.exp_avg_ipt and _kept(trainer.model) < INIT_R * MODULES
    trainer.remove_callback(Stop)
    trainer.train()
    assert found == [(0, None), (0, None)]
    assert calls.calls == [1, *range(1, STEPS + 1)]
    assert _kept(trainer.model) == BUDGET


def _lora() -> Any:
    return peft.get_peft_model(_base(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def _loaded_for_inference(folder: Path) -> Any:
    _model().save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(_base(), str(folder))


def _pruned(folder: Path) -> Any:
    trainer = _trainer(folder)
    trainer.train()
    trainer.save_model(str(folder / "cut"))
    return peft.PeftModel.from_pretrained(_base(), str(folder / "cut"), is_trainable=True)


def _other_active(folder: Path) -> Any:
    model = _model()
    model.add_adapter("second", _config(inference_mode=True))
    model.set_adapter("second")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: _lora(), "found no AdaLoRA adapter in PeftModelForCausalLM"),
        (_loaded_for_inference, "found 0 AdaLoRA models with an adapter to train"),
        (_pruned, "found an adapter with 8 of its 24 ranks"),
        (_other_active, r"found the adapters \['second'\] active, expected 'default'"),
        (lambda folder: _model(tinit=10, total_step=100), r"tinit: found 10, expected less than .*12 - 4 = 8"),
        (lambda folder: _model(tfinal=11, total_step=100), "tfinal: found 11 with total_step=12"),
        (lambda folder: _model(target_r=INIT_R), "target_r: found 6, expected less than init_r=6"),
    ],
)
@pytest.mark.filterwarnings("ignore:total_step")
def test_what_cannot_work_is_refused_before_the_first_step(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    model = make(tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or parameter.dim() == 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, model).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_adapters_and_a_wrapper(tmp_path: Path) -> None:
    """A second adapter that is not trained stays as it is, and the model may lie inside another module."""

    class Wrapped(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model = _model()
    model.add_adapter("second", _config(inference_mode=True))
    second = {name: value.clone() for name, value in model.state_dict().items() if ".second" in name}
    _trainer(tmp_path, Wrapped(model), remove_unused_columns=False).train()
    assert _kept(model) == BUDGET
    assert second and all(torch.equal(model.state_dict()[name], value) for name, value in second.items())


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    model = _model()
    next(p for n, p in model.named_parameters() if "lora_A" in n).ds_id = 1
    with pytest.raises(NotImplementedError, match="DeepSpeed, FSDP"):
        _trainer(tmp_path, model).train()

    trainer = _trainer(tmp_path)
    trainer.args.distributed_state = type("State", (), {"distributed_type": "FSDP"})()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AdaLoraCallback))
    with pytest.raises(NotImplementedError, match="found training under FSDP"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)


def test_gradients_that_are_gone_are_noticed(tmp_path: Path) -> None:
    class Clear(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].zero_grad()

    trainer = transformers.Trainer(
        model=_model(), args=_arguments(tmp_path), train_dataset=_Data(), callbacks=[Clear(), AdaLoraCallback()]
    )
    with pytest.raises(RuntimeError, match="no gradient on any lora_A"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_step": 0}, ValueError, "total_step: found 0, expected at least 1"),
        ({"total_step": 1.5}, TypeError, "total_step: found 1.5"),
        ({"missing_state": "ignore"}, ValueError, "missing_state: found 'ignore'"),
        ({"allocator": object()}, TypeError, "allocator: found object, expected a BudgetAllocator"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaLoraCallback(**options)


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "peftkernels.integrations.transformers")
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'peftkernels\[hf\]'"):
        importlib.import_module("peftkernels.integrations.transformers")


def _own_layers() -> tuple[Any, AdaLoraAllocator]:
    model = _base().requires_grad_(False)
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
        trainer = _trainer(tmp_path / name, model, AdaLoraCallback(allocator=allocator), **options)
        if name == "whole":
            trainer.train()
        else:
            # The folder is found where the Trainer writes its own checkpoints.
            (tmp_path / "whole").rename(tmp_path / "resumed")
            trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{saved}"))
        assert allocator.steps == STEPS and allocator.optimizer is None
        ends.append((_trained(model), allocator.rank_pattern()))
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
    _trainer(tmp_path, model, AdaLoraCallback(allocator=allocator)).train()
    by_hand, other = _own_layers()
    trainer = _trainer(tmp_path, by_hand, AddTerm(other))
    other.attach(trainer.create_optimizer())
    trainer.train()
    _assert_equal(model, by_hand)
    assert allocator.rank_pattern() == other.rank_pattern()


def test_an_allocator_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, allocator = _own_layers()
    with pytest.raises(ValueError, match=r"last allocation is at step 8, but the Trainer makes 5 optimizer steps"):
        _trainer(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=5).train()
    with pytest.warns(UserWarning, match="found 12 in the allocator and 14 optimizer steps"):
        _trainer(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=14).train()
    with pytest.raises(ValueError, match="found one that has made 14 steps"):
        _trainer(tmp_path, model, AdaLoraCallback(allocator=allocator), max_steps=14).train()


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
            model=_base() if made_by_trl else _model(),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"text": rows}),
            processing_class=tokenizer,
            peft_config=_config(total_step=FROM_TRAINER) if made_by_trl else None,
            callbacks=[AdaLoraCallback()],
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert _kept(whole.model) == BUDGET
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    _assert_equal(resumed.model, whole.model)
    assert _pattern(resumed.model) == _pattern(whole.model)
