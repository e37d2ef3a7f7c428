"""What happens at an optimizer step: statistics are updated, ranks are chosen, masks are written."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from peftkernels.allocation.layers.gated import FACTORS
from peftkernels.allocation.run.deciding import choose_ranks
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.parts import RunParts


class Stepper(Protocol):
    """Makes the steps of a run."""

    def advance(self, step: int | None) -> None:
        """Make optimizer step `step`, the next one when None."""
        ...

    def after_optimizer_step(self, overflow: Tensor | None) -> bool:
        """Make the next step after a call of the optimizer.

        Args:
            overflow: What a GradScaler found in the gradients, not zero for an overflow, after which the optimizer
                does not step; None without a scaler.

        Returns:
            False if there was no step to make, as far as the host knows.
        """
        ...


class HostStepper:
    """Makes the steps of a run whose step count and schedule are the host's."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts

    def advance(self, step: int | None) -> None:
        parts = self._parts
        before, last = parts.progress.steps, parts.settings.last_allocation
        step = before + 1 if step is None else checked_step(step, before)
        parts.masks.check_writable()
        parts.layers.forget()
        parts.follow_device()
        parts.statistics.begin_step(step)
        if step < last:
            self._update(step)
            if parts.statistics.shares.due(step):
                self._decide(step)
            elif not parts.masks.all_active:
                parts.masks.write_all_active()
        elif not parts.progress.released:
            if before == 0:
                raise ValueError(f"step: found {step} as the first, expected less than {last}: there are no scores yet")
            parts.progress.release()
            self._decide(step)
            parts.strategy.release()
            # Read once now that the counts are final, for their warnings.
            _ = parts.progress.nonfinite_steps, parts.progress.undecided_steps
        else:
            parts.write_states(mask=True)
        parts.progress.count_step(step)
        parts.idle.reset()
        parts.layers.forget()
        if parts.watchers.observers and parts.statistics.loss is not None:
            parts.watchers.on_event(step, "loss", {"value": float(parts.statistics.loss)})

    def after_optimizer_step(self, overflow: Tensor | None) -> bool:
        if overflow is None or not bool(overflow):
            self.advance(None)
            return True
        parts = self._parts
        parts.progress.count_skipped()
        parts.idle.reset()
        parts.statistics.begin_step()
        # An event of the step that is tried again: events of the last one lie before a checkpoint made there.
        why = "the gradient scaler found an overflow; the optimizer did not step"
        parts.watchers.on_event(parts.progress.steps + 1, "skipped", {"why": why})
        return False

    def _update(self, step: int) -> None:
        parts = self._parts
        finite = update_strategy(parts)
        for details in parts.strategy.moved():
            parts.watchers.on_event(step, "moved", details)
        parts.progress.count_gradients(finite)
        if finite.device.type == "cpu" and not finite:
            why = "gradients are not finite; the scores stay as they were"
            parts.watchers.on_event(step, "skipped", {"why": why})
            _ = parts.progress.nonfinite_steps

    def _decide(self, step: int) -> None:
        parts = self._parts
        statistics, watchers = parts.statistics, parts.watchers
        # A copy: strategies may give the tensor that they go on averaging in.
        scores = parts.strategy.scores(statistics).clone()
        choice = choose_ranks(parts.strategy, statistics, parts.masks, scores, step, parts.progress.informed)
        parts.masks.take(choice.keep)
        parts.write_states(mask=True)
        parts.progress.count_undecided(choice.left)
        if scores.device.type == "cpu" or watchers.observers:
            if choice.left:
                _ = parts.progress.undecided_steps
                why = f"the scores at step {step} are not finite or all the same; the mask before stays"
                watchers.on_event(step, "skipped", {"why": why})
            if not choice.decided:
                return
        budget = statistics.shares.budget(step)
        parts.progress.decide(Decision(step, budget, scores, choice.thresholds.clone()))
        if watchers.observers:
            own = [part.tolist() for part in statistics.per_layer(scores)]
            kept = list(parts.masks.pattern().values())
            watchers.on_decision(step, budget, statistics.by_module(choice.thresholds), own, kept)


def checked_step(step: int, before: int) -> int:
    """Return `step` where it is one after `before`; raise TypeError or ValueError otherwise."""
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step: found {step!r} ({type(step).__name__}), expected an int or None")
    if step <= before:
        raise ValueError(f"step: found {step}, expected more than the last step, {before}; steps count from 1")
    return step


def update_strategy(parts: RunParts) -> Tensor:
    """Let the strategy take in a step, and warn of factors without a gradient.

    Returns:
        0-dim bool, True if the gradients that were looked at are finite.

    Raises:
        RuntimeError: Where no layer that trains has a gradient.
    """
    statistics, frozen = parts.statistics, parts.masks.frozen
    training = [layer for name, layer in parts.layers.own.items() if name not in frozen]
    if training and not any(getattr(layer, factor).grad is not None for layer in training for factor in FACTORS):
        raise RuntimeError(
            "the allocator found no gradient on any lora_A, lora_B or lora_E: it must run after backward() and "
            "optimizer.step(), before the gradients are cleared"
        )
    parts.strategy.update(statistics)
    missing = [name for name in statistics.missing if name.rpartition(".")[0] not in frozen]
    if missing:
        shown = ", ".join(missing[:6]) + (" and others" if len(missing) > 6 else "")
        message = f"no gradient on {shown}: the scores count a missing gradient as zero"
        parts.watchers.warn_once("missing", message)
    return statistics.finite
