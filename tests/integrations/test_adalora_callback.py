"""AdaLoraCallback in HF's Trainer: the right step and schedule, skipped steps, what is refused."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
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
    TINIT,
    Calls,
    HandWritten,
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
from torch import nn

from peftkernels.integrations.transformers import FROM_TRAINER, AdaLoraCallback


@pytest.mark.parametrize(("accumulated", "clipped"), [(1, 1.0), (3, 0.05), (1, 0.0)])
def test_masks_equal_those_of_a_loop_that_calls_peft_after_the_optimizer(
    tmp_path: Path, accumulated: int, clipped: float
) -> None:
    options = {"gradient_accumulation_steps": accumulated, "max_grad_norm": clipped}
    calls, hand = Calls(), HandWritten()
    ours = trainer_for(tmp_path / "ours", more=(calls,), **options)
    ours.train()
    theirs = trainer_for(tmp_path / "theirs", callback=hand, **options)
    theirs.train()
    assert calls.calls == hand.calls == list(range(1, STEPS + 1))
    assert kept_ranks(ours.model) == BUDGET
    assert nonzero_gates(calls.gates[-1]) == BUDGET
    assert nonzero_gates(calls.gates[TINIT - 1]) == INIT_R * MODULES
    assert pattern_of(ours.model) == pattern_of(theirs.model)
    for gates, masks in zip(calls.gates, hand.masks, strict=True):
        assert nonzero_gates(gates) == (INIT_R * MODULES if masks is None else sum(map(sum, masks.values())))
    assert_equal(ours.model, theirs.model)


def test_clipping_changes_the_masks_by_the_clipped_gradient(tmp_path: Path) -> None:
    """The scores are of the clipped gradient: with clipping their averages are smaller."""
    sizes = []
    for norm in (0.0, 1e-3):
        trainer = trainer_for(tmp_path, max_steps=4, max_grad_norm=norm, callback=AdaLoraCallback(total_step=STEPS))
        with pytest.warns(UserWarning, match="last allocation, at step 8, is not reached"):
            trainer.train()
        averages = trainer.model.base_model.rankallocator.exp_avg_ipt
        sizes.append(sum(float(value.sum()) for value in averages.values()))
    assert 0 < sizes[1] < 0.1 * sizes[0]


def test_early_stop_and_evaluation_keep_the_masks(tmp_path: Path) -> None:
    # Without dropout: an evaluation draws from the generator that dropout draws from.
    whole = Calls()
    trainer_for(tmp_path / "whole", adalora_model(lora_dropout=0.0), more=(whole,)).train()
    stopped = Calls()
    trainer = transformers.Trainer(
        model=adalora_model(lora_dropout=0.0),
        args=training_arguments(
            tmp_path / "stopped",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=False,
            metric_for_best_model="made_up",
            greater_is_better=False,
        ),
        train_dataset=RandomTexts(),
        eval_dataset=torch.utils.data.Subset(RandomTexts(), range(4)),
        compute_metrics=Metric([0.5, 0.4, 0.3, 0.9, 0.9, 0.9]),
        callbacks=[AdaLoraCallback(), transformers.EarlyStoppingCallback(early_stopping_patience=3), stopped],
    )
    with pytest.warns(UserWarning, match="as it was after step 6, before the last allocation at step 8"):
        trainer.train()
    assert stopped.calls == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(stopped.gates, whole.gates, strict=False):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert kept_ranks(trainer.model) == nonzero_gates(whole.gates[5])


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
    calls = Calls()
    trainer = trainer_for(tmp_path, more=(_Overflow(*skipped), calls), optim=optimizer)
    trainer.train()
    expected = [step for step in range(1, STEPS + 1) if step not in skipped]
    if skipped == (LAST,):
        # The step after makes up for the last allocation.
        expected[expected.index(LAST + 1)] = LAST
    assert calls.calls == expected
    for step in skipped[:1] if skipped[0] > 1 else ():
        for name, value in calls.gates[step - 2].items():
            assert torch.equal(calls.gates[step - 1][name], value), name
    assert kept_ranks(trainer.model) == BUDGET == nonzero_gates(calls.gates[-1])
    assert all(bool(value.isfinite().all()) for value in trained_parameters(trainer.model).values())


def test_the_last_allocation_is_made_up_for_where_the_last_step_is_skipped(tmp_path: Path) -> None:
    calls = Calls()
    trainer = trainer_for(tmp_path, adalora_model(tinit=STEPS - 2, tfinal=0), more=(_Overflow(STEPS), calls))
    trainer.train()
    assert nonzero_gates(calls.gates[-1]) > BUDGET
    assert kept_ranks(trainer.model) == BUDGET == nonzero_gates(gates_of(trainer.model))


def test_total_steps_come_from_the_trainer(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, adalora_model(total_step=500))
    with pytest.warns(UserWarning, match="found 500 in the AdaLoraConfig and 12 optimizer steps in the Trainer"):
        trainer.train()
    assert trainer.model.peft_config["default"].total_step == STEPS
    assert kept_ranks(trainer.model) == BUDGET


@pytest.mark.parametrize("found", [FROM_TRAINER, None])
def test_a_placeholder_is_replaced_in_silence(tmp_path: Path, found: int | None) -> None:
    model = adalora_model(total_step=FROM_TRAINER)
    model.peft_config["default"].total_step = found
    # Counted in epochs: 160 rows in batches of 2, 5 accumulated, are 16 steps.
    trainer = trainer_for(tmp_path, model, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(total_step|allocation).*")
        trainer.train()
    assert model.peft_config["default"].total_step == 16
    assert kept_ranks(model) == BUDGET


def test_a_given_total_step_wins(tmp_path: Path) -> None:
    calls = Calls()
    trainer = trainer_for(tmp_path, callback=AdaLoraCallback(total_step=10), more=(calls,))
    trainer.train()
    assert trainer.model.peft_config["default"].total_step == 10
    assert [nonzero_gates(gates) for gates in calls.gates[5:]] == [BUDGET] * 7


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

    calls = Calls()
    trainer = trainer_for(tmp_path, adalora_model(tinit=0), more=(Look(), calls, Stop()))
    with pytest.warns(UserWarning, match="as it was after step 1"):
        trainer.train()
    assert trainer.model.base_model.rankallocator.exp_avg_ipt and kept_ranks(trainer.model) < INIT_R * MODULES
    trainer.remove_callback(Stop)
    trainer.train()
    assert found == [(0, None), (0, None)]
    assert calls.calls == [1, *range(1, STEPS + 1)]
    assert kept_ranks(trainer.model) == BUDGET


def _lora() -> Any:
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def _loaded_for_inference(folder: Path) -> Any:
    adalora_model().save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(tiny_llama(), str(folder))


def _pruned(folder: Path) -> Any:
    trainer = trainer_for(folder)
    trainer.train()
    trainer.save_model(str(folder / "cut"))
    return peft.PeftModel.from_pretrained(tiny_llama(), str(folder / "cut"), is_trainable=True)


def _other_active(folder: Path) -> Any:
    model = adalora_model()
    model.add_adapter("second", adalora_config(inference_mode=True))
    model.set_adapter("second")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: _lora(), "found no AdaLoRA adapter in PeftModelForCausalLM"),
        (_loaded_for_inference, "found 0 AdaLoRA models with an adapter to train"),
        (_pruned, "found an adapter with 8 of its 24 ranks"),
        (_other_active, r"found the adapters \['second'\] active, expected 'default'"),
        (lambda folder: adalora_model(tinit=10, total_step=100), r"tinit: found 10, expected less than .*12 - 4 = 8"),
        (lambda folder: adalora_model(tfinal=11, total_step=100), "tfinal: found 11 with total_step=12"),
        (lambda folder: adalora_model(target_r=INIT_R), "target_r: found 6, expected less than init_r=6"),
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
        trainer_for(tmp_path, model).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_adapters_and_a_wrapper(tmp_path: Path) -> None:
    """A second adapter that is not trained stays as it is, and the model may lie inside another module."""

    class Wrapped(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model = adalora_model()
    model.add_adapter("second", adalora_config(inference_mode=True))
    second = {name: value.clone() for name, value in model.state_dict().items() if ".second" in name}
    trainer_for(tmp_path, Wrapped(model), remove_unused_columns=False).train()
    assert kept_ranks(model) == BUDGET
    assert second and all(torch.equal(model.state_dict()[name], value) for name, value in second.items())


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    model = adalora_model()
    next(p for n, p in model.named_parameters() if "lora_A" in n).ds_id = 1
    with pytest.raises(NotImplementedError, match="DeepSpeed, FSDP"):
        trainer_for(tmp_path, model).train()

    trainer = trainer_for(tmp_path)
    trainer.args.distributed_state = type("State", (), {"distributed_type": "FSDP"})()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AdaLoraCallback))
    with pytest.raises(NotImplementedError, match="found training under FSDP"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)


def test_gradients_that_are_gone_are_noticed(tmp_path: Path) -> None:
    class Clear(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].zero_grad()

    trainer = transformers.Trainer(
        model=adalora_model(),
        args=training_arguments(tmp_path),
        train_dataset=RandomTexts(),
        callbacks=[Clear(), AdaLoraCallback()],
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
    for name in [name for name in sys.modules if name.startswith("peftkernels.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'peftkernels\[hf\]'"):
        importlib.import_module("peftkernels.integrations.transformers")
