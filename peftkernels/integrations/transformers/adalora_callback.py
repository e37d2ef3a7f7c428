"""AdaLoRA in transformers' Trainer and in trl's, which is one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkernels.allocation.run.state_checks import within
from peftkernels.integrations.transformers.allocator_training import AllocatorTraining
from peftkernels.integrations.transformers.checkpoint_state import (
    STATE_NAME,
    read_checkpoint,
    state_folder,
    write_state,
)
from peftkernels.integrations.transformers.peft_training import PeftTraining
from peftkernels.integrations.transformers.sharded_refusal import refuse_sharded
from peftkernels.integrations.transformers.watched_load import WatchedLoad, watch_load

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("AdaLoraCallback needs transformers: pip install 'peftkernels[hf]'") from error

if TYPE_CHECKING:
    from torch import nn

    from peftkernels.allocation import BudgetAllocator

FROM_TRAINER = 2**31 - 1
"""A total_step for peft's AdaLoraConfig, which wants one before the Trainer knows it: AdaLoraCallback replaces it."""


class AdaLoraCallback(TrainerCallback):
    """Allocates the ranks of an AdaLoRA model while transformers' Trainer, or a trainer of trl, fine-tunes it.

        config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=50, tfinal=200, total_step=FROM_TRAINER)
        model = peft.get_peft_model(model, config)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[AdaLoraCallback()])
        trainer.train()

    Without it, or a call of `update_and_allocate` of one's own, peft's AdaLoRA never masks a rank. It runs after every
    optimizer step and before the gradients are cleared: the gradients are those the optimizer used, accumulated,
    averaged over processes, unscaled and clipped. A step that a GradScaler skipped allocates nothing.

    Every checkpoint gets a file adalora_state.safetensors with what peft does not save: the averages of the scores, the
    pattern, and the adapter with all its ranks. A training that is resumed from it ends with the bits of one that was
    not interrupted. While training runs, the configuration's `rank_pattern` is None between steps and checkpoints hold
    every rank, those masked with gate zero; when it ends the pattern is back, and saving the model cuts it as ever.

    Args:
        allocator: for layers of `peftkernels.nn`: the allocator over them, which is attached to the optimizer for the
            training, and whose orthogonality term is added (after clipping). None: the model has an AdaLoRA adapter of
            HF peft.
        total_step: optimizer steps the schedule of a peft adapter is laid out for; None takes the Trainer's, and warns
            where the adapter's configuration says another number.
        resume_from_checkpoint: folder to take the state from when the Trainer resumes; None finds the folder the
            Trainer loaded, or looks in its output folder. What is found must hold the parameters that the Trainer
            loaded.
        missing_state: what is done where a resumed checkpoint has no state: "error", or "warn" and begin the averages
            anew, which is possible before the last allocation and with peft's adapters.

    Raises:
        ValueError, TypeError: before the first step, naming the argument.
        NotImplementedError: before the first step, for parameters that are sharded (DeepSpeed, FSDP).
        ImportError: peft is needed and not installed.
    """

    def __init__(
        self,
        *,
        allocator: BudgetAllocator | None = None,
        total_step: int | None = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        missing_state: str = "error",
    ) -> None:
        if total_step is not None:
            if not isinstance(total_step, int) or isinstance(total_step, bool):
                raise TypeError(f"total_step: found {total_step!r} ({type(total_step).__name__}), expected an int")
            if total_step < 1:
                raise ValueError(f"total_step: found {total_step}, expected at least 1")
            if allocator is not None:
                raise ValueError(f"total_step: found {total_step} beside an allocator, which has its own; expected one")
        if missing_state not in ("error", "warn"):
            raise ValueError(f"missing_state: found {missing_state!r}, expected 'error' or 'warn'")
        self._own = None if allocator is None else AllocatorTraining(allocator)
        self._total_step = total_step
        self._resume = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._missing_state = missing_state
        self._training: AllocatorTraining | PeftTraining | None = None
        self._load: WatchedLoad | None = None
        self._scale = 1.0

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """The Trainer is made: note from now on where it loads the adapter from."""
        if model is not None and self._own is None:
            self._load = watch_load(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything, settle the schedule, and take over the state of the checkpoint that is resumed."""
        model: nn.Module = kwargs["model"]
        training = PeftTraining(model) if self._own is None else self._own
        refuse_sharded(args, training.factors)
        training.begin(kwargs["optimizer"], state.max_steps, self._total_step, FROM_TRAINER)
        if state.global_step > 0:
            self._take_over(training, args, state.global_step)
        elif self._own is not None and self._own.allocator.steps > 0:
            steps = self._own.allocator.steps
            raise ValueError(f"allocator: found one that has made {steps} steps, expected a new one for a new training")
        if self._own is None:
            self._load = watch_load(model)
            if self._load is not None:
                self._load.folder = None
        self._training = training

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are clipped, the optimizer has not stepped yet."""
        self._running().before_step()
        if _steps_itself_on_overflow(kwargs["optimizer"]):
            self._scale = kwargs["optimizer"].scaler.get_scale()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped; `global_step` counts the steps before this one."""
        optimizer = kwargs["optimizer"]
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        if _steps_itself_on_overflow(optimizer):
            skipped = skipped or optimizer.scaler.get_scale() < self._scale
        self._running().after_step(state.global_step + 1, skipped)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is written: put the state beside it."""
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            warnings.warn(
                f"found no folder {folder} after a checkpoint was saved: {STATE_NAME} is not written, and a training "
                "resumed from that checkpoint will lack it",
                UserWarning,
                stacklevel=2,
            )
            return
        training = self._running()
        tensors, facts = training.pack()
        write_state(folder, tensors, {"kind": training.kind, "step": state.global_step, **facts})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the pattern of the best checkpoint where the Trainer loaded it, and let go of the model."""
        training = self._running()
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            folder = state_folder(state.best_model_checkpoint)
            tensors, facts = ({}, {}) if folder is None else read_checkpoint(folder)
            if folder is None or facts["kind"] != training.kind or training.difference(tensors) is not None:
                warnings.warn(
                    f"load_best_model_at_end: {state.best_model_checkpoint} has no {STATE_NAME} with the parameters "
                    "that were loaded: the masks are those of the last step",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                with within(f"{folder / STATE_NAME}"):
                    training.adopt(tensors, facts)
                step = facts["step"]
        training.end(step)
        self._training = None

    def _running(self) -> AllocatorTraining | PeftTraining:
        if self._training is None:
            raise RuntimeError(
                "AdaLoraCallback was added while a training runs, expected it before trainer.train(): "
                "Trainer(..., callbacks=[AdaLoraCallback()])"
            )
        return self._training

    def _take_over(self, training: AllocatorTraining | PeftTraining, args: Any, step: int) -> None:
        """Go on from the state that belongs to the checkpoint the Trainer has loaded, made after `step` steps."""
        loaded = None if self._load is None else self._load.folder
        if self._resume is not None:
            folders = [self._resume]
        elif loaded is not None:
            folders = [loaded]
        else:
            given = args.resume_from_checkpoint
            folders = [Path(given)] if isinstance(given, str) and os.path.isdir(given) else []
            folders.append(Path(args.output_dir) / f"checkpoint-{step}")
        folder = next((found for place in folders if (found := state_folder(place)) is not None), None)
        if folder is None:
            self._without_state(training, step, " or ".join(map(str, folders)))
            return
        tensors, facts = read_checkpoint(folder)
        if facts["kind"] != training.kind or facts["step"] != step:
            raise ValueError(
                f"resume_from_checkpoint: found the state of {facts['kind']!r} at step {facts['step']} in {folder}, "
                f"expected {training.kind!r} at step {step}"
            )
        different = training.difference(tensors)
        if different is not None:
            raise ValueError(
                f"resume_from_checkpoint: found in {folder} the state of other parameters than the Trainer loaded "
                f"({different}), expected those; name the folder: AdaLoraCallback(resume_from_checkpoint=...)"
            )
        with within(f"{folder / STATE_NAME}"):
            training.unpack(tensors, facts)

    def _without_state(self, training: AllocatorTraining | PeftTraining, step: int, places: str) -> None:
        """The checkpoint has no state: refuse to go on, or say what that means."""
        if isinstance(training, AllocatorTraining) and training.allocator.steps == step:
            return
        message = (
            f"resume_from_checkpoint: found no {STATE_NAME} in {places}, expected the file that AdaLoraCallback writes "
            "into every checkpoint; the averages that ranks are judged by and the pattern are lost without it"
        )
        if self._missing_state == "error" or training.kind != "peft" or step >= training.last_allocation:
            raise ValueError(message)
        warnings.warn(message + ": they begin anew", UserWarning, stacklevel=3)


def _steps_itself_on_overflow(optimizer: Any) -> bool:
    """Return True if a GradScaler calls this optimizer even after an overflow, when it leaves the parameters alone."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return getattr(optimizer, "scaler", None) is not None and getattr(inner, "_step_supports_amp_scaling", False)
