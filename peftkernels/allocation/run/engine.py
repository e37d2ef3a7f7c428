"""The allocator: runs a strategy after every optimizer step and turns its scores into rank plans under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peftkernels.allocation.budget.budgets import Budget
from peftkernels.allocation.layers.gated import GatedLayer
from peftkernels.allocation.layers.ownership import leave_layers, take_layers
from peftkernels.allocation.layers.sharding import check_not_sharded_since
from peftkernels.allocation.logs.observer import Observer
from peftkernels.allocation.run.captured import CapturedStepper
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.explain import explain_decision, run_facts
from peftkernels.allocation.run.hook import found_overflow, run_after_step
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.report import AllocationReport
from peftkernels.allocation.run.settings import AllocatorSettings
from peftkernels.allocation.run.snapshot import Snapshot, restore_snapshot, take_snapshot
from peftkernels.allocation.run.state import pack_state, unpack_state
from peftkernels.allocation.run.stepping import HostStepper, Stepper
from peftkernels.allocation.run.term import add_term_gradient, term_of
from peftkernels.allocation.strategies.strategy import Strategy


class BudgetAllocator:
    """Rank budgets by any strategy: masks the ranks that score lowest while the budget falls.

        allocator = BudgetAllocator(model, Magnitude(), total_step=1000, target_r=8, tinit=100, tfinal=300)
        allocator.attach(optimizer)
        for batch in batches:
            (loss(model, batch) + allocator.regularization()).backward()
            optimizer.step()
            optimizer.zero_grad()

    The budget falls along `CubicSchedule` from what all ranks cost to the final budget, between step `tinit` and step
    `total_step - tfinal`. Every `deltaT` steps the ranks with the lowest scores are masked by setting their gate lora_E
    to zero; they can come back while the budget still falls.

    `RankMasks` says which states the ranks have when, and `RunProgress` what becomes of steps whose gradients or scores
    are not finite and of those that a GradScaler skips. A factor without a gradient counts as one with gradient zero
    and is warned about once; if no factor has one, `step` raises RuntimeError. Besides the scaler's flag, and what
    observers and callbacks ask for, no step makes the host wait for an accelerator before the last allocation.

    Args:
        model: A module with AdaLoRALinear layers, or a mapping of names to such layers, all on one device.
        strategy: The rule that scores ranks: `peftkernels.allocation.strategies`.
        total_step: Optimizer steps of the whole run.
        target_r: Average rank per layer at the end, below every layer's initial rank; 8 without a budget.
        budget: In place of target_r: a `Budget` in ranks, parameters, microseconds or bytes, with groups.
        costs: Cost of one rank by layer name, for a budget in microseconds or bytes.
        tinit: Steps before the first mask.
        tfinal: Steps at the end in which the ranks stay as they are.
        deltaT: Steps between two masks.
        orth_reg_weight: Weight w of the orthogonality term.
        exact_budget: False masks all ranks that tie with the threshold, as peft does, unless none would stay. True
            keeps exactly the budget; of ranks that tie, those of earlier layers and lower index stay.
        compact: True makes masked ranks DEAD instead of PROBE after step total_step - tfinal. They then cost nothing,
            and the run departs from peft's: their gates get no gradient, so the norm that gradient clipping sees is
            smaller, and the orthogonality term covers the kept ranks only.
        capturable: True keeps step count, schedule and masks on the device, so that a CUDA graph may capture `step`
            once and replay it for every optimizer step; `compact` is not available then.
        impl: Which implementation computes a step: "eager", "cpu" (C++), "triton", or "auto" for the fastest that can.

    Attributes:
        settings: The arguments above that decide.
        strategy: The strategy.
        statistics: What the strategy looks at.
        masks: Which ranks are kept; the only writer of gates and rank plans.
        parts: These and the other parts that the run consists of.

    Raises:
        TypeError: Naming the argument found wrong.
        ValueError: Likewise, and for a layer that has an allocator already: `close` hands layers over.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        strategy: Strategy,
        *,
        total_step: int,
        target_r: int | None = None,
        budget: Budget | None = None,
        costs: Mapping[str, float] | None = None,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        orth_reg_weight: float = 0.0,
        exact_budget: bool = False,
        compact: bool = False,
        capturable: bool = False,
        impl: str = "auto",
    ) -> None:
        settings = AllocatorSettings(
            total_step=total_step,
            target_r=target_r,
            budget=budget,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            orth_reg_weight=orth_reg_weight,
            exact_budget=exact_budget,
            compact=compact,
            capturable=capturable,
        )
        self._begin(RunParts.make(model, strategy, settings, costs, impl))

    def _begin(self, parts: RunParts) -> None:
        """Take the parts, and the layers that they are about."""
        self.parts = parts
        self.settings = parts.settings
        self.strategy = parts.strategy
        self.statistics = parts.statistics
        self.masks = parts.masks
        schedule = parts.progress.schedule
        self._stepper: Stepper = HostStepper(parts) if schedule is None else CapturedStepper(parts, schedule)
        self._callbacks: list[Callable[[BudgetAllocator], None]] = []
        self._handle: RemovableHandle | None = None
        self._optimizer: Optimizer | None = None
        self._closed = False
        take_layers(self, parts.layers.modules)

    def attach(self, optimizer: Optimizer) -> None:
        """Run after every `optimizer.step()` from now on, until `detach`.

        Raises:
            RuntimeError: When attached already, when closed, or when the layers were sharded since the allocator was
                made.
            TypeError: For anything but an optimizer.
            ValueError: Where lora_A, lora_B or lora_E of a layer that is not frozen are not among the optimizer's
                parameters; names them.
        """
        self._check_open()
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer already; call detach() first")
        layers = self.parts.layers
        if not layers.sharded:
            check_not_sharded_since(layers.own)
        run = self._after_optimizer_step
        self._handle, self._optimizer = run_after_step(optimizer, run, layers.own, self.frozen)

    def detach(self) -> None:
        """Undo `attach`; does nothing when not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = self._optimizer = None

    def close(self) -> None:
        """Undo `attach`, and leave the layers, with their ranks as they are, to another allocator.

        A layer has one allocator at a time, and gives it up when that is closed or no longer referred to. After this
        the allocator can be read and saved; what would change a layer raises RuntimeError. Does nothing when closed.
        """
        self.detach()
        leave_layers(self, self.parts.layers.modules)
        self._closed = True

    def observe(self, loss: Tensor | float) -> None:
        """Take the loss of the step that is being made, before `optimizer.step()`.

        Strategies that learn from the loss, rollback policies and logs need it; AdaLoRA itself does not. Several calls
        before one optimizer step, as with accumulated batches, count as their mean. Give the loss itself, not the one
        that a GradScaler scaled. Losses of a step for which a scaler did not call the optimizer count with the next.
        """
        self.statistics.take_loss(loss)

    def regularization(self) -> Tensor:
        """Return the orthogonality term w/(2n)·Σ(‖A·Aᵀ-I‖_F + ‖Bᵀ·B-I‖_F) over the n layers, 0-dim, for the loss.

        Masked ranks are included, as in peft, except DEAD ones (`compact=True` after the last allocation, frozen
        layers). `add_regularization_gradient` does the same for less.
        """
        self._warn_if_idle()
        return term_of(self.parts)

    def add_regularization_gradient(self, scale: float = 1.0) -> Tensor:
        """Add `scale` times the gradient of `regularization()` to the factors' `.grad`; returns the term, 0-dim.

        It does what adding the term to the loss does, in closed form and without an autograd graph:

            loss(model, batch).backward()
            allocator.add_regularization_gradient()
            optimizer.step()

        Call it once per optimizer step, after the last backward() and before gradients are clipped or the optimizer
        steps; scale is the loss scale where gradients are scaled (`GradScaler.get_scale()`). `.grad` is created where
        it is None, and factors that do not require a gradient are left alone.
        """
        self._warn_if_idle()
        return add_term_gradient(self.parts, scale)

    def step(self, step: int | None = None) -> None:
        """Advance to optimizer step `step` (the next one when None), for loops without an optimizer hook.

        Call it after `optimizer.step()` and before the gradients are cleared. Where `capturable` is True a step that is
        given is read by the host, and may not pass over the last allocation.

        Raises:
            RuntimeError: When attached, since the hook calls it then, and when closed.
            ValueError: For a step that is not after the last one; steps count from 1.
        """
        self._check_open()
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer, whose hook steps it; call detach() first")
        self._stepper.advance(step)
        self._call_back()

    def budget(self, step: int) -> float:
        """Return what the schedule allows after optimizer step `step`, over all layers; an int unless measured."""
        return self.statistics.shares.budget(step)

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Return for every layer by name which ranks the last mask kept; all of them before the first mask."""
        self._warn_if_idle()
        return self.masks.pattern()

    def freeze(self, name: str, *, drop: bool = True) -> None:
        """Take a layer out of the fine-tuning: its factors no longer require grad, and its ranks no longer change.

        Frozen layers at the input of a model end the backward pass early, since nothing before them requires a
        gradient. An optimizer leaves frozen factors alone, weight decay included, since they have no gradient. Only
        `rollback` and `load_state_dict` undo it; freezing a frozen layer does nothing.

        Every process of a parallel run must freeze the same layers at the same step. DistributedDataParallel expects a
        gradient of all that required one when it was made: freeze before that, or give it find_unused_parameters=True.
        Where `capturable` is True, freeze before the step is captured, or capture it anew.

        Args:
            name: The layer.
            drop: True keeps none of its ranks: all are DEAD, contribute nothing and cost nothing, and the budget
                belongs to the other layers. False keeps the ranks of the last mask (all before the first), with what
                they contribute; they go on counting against the budget, and the other layers get what remains of it.

        Raises:
            ValueError: For an unknown layer.
        """
        self._check_open()
        if self.parts.freeze(name, drop):
            self.notify("frozen", {"module": name})

    def add_observer(self, observer: Observer) -> None:
        """Tell `observer` from now on what is decided, and at once where the run stands.

        Reading a decision synchronises with the device; where `capturable` is True an observer is refused (ValueError).
        """
        self.parts.check_on_host("observer", "tells nothing to")
        self.parts.watchers.add(observer, run_facts(self.parts))

    def add_callback(self, callback: Callable[[BudgetAllocator], None]) -> None:
        """Call `callback` with this allocator after every step; refused (ValueError) where `capturable` is True."""
        self.parts.check_on_host("callback", "calls nothing on")
        self._callbacks.append(callback)

    def notify(self, kind: str, details: Mapping[str, Any]) -> None:
        """Tell the observers of an event at the last step, for policies and strategies; see `Observer.on_event`."""
        self.parts.watchers.on_event(self.steps, kind, details)

    def explain(self) -> AllocationReport:
        """Return the last decision, layer by layer: ranks kept, scores, margin to the threshold, and why."""
        self._warn_if_idle()
        return explain_decision(self.parts)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer the allocator is attached to."""
        return self._optimizer

    @property
    def layers(self) -> Mapping[str, GatedLayer]:
        """The layers by name, with whole factors."""
        return self.masks.layers

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers given to `freeze`."""
        return self.masks.frozen

    @property
    def sharded(self) -> bool:
        """True if the layers' factors are sharded over processes, as FSDP2 does it."""
        return self.parts.layers.sharded

    @property
    def all_active(self) -> bool:
        """True if every rank trains, as before the first mask and between two; reads the device where `capturable`."""
        return self.parts.all_active

    @property
    def released(self) -> bool:
        """True if the last allocation is done and the strategy's state is gone."""
        return self.parts.progress.released

    @property
    def steps(self) -> int:
        """Optimizer steps so far; reads the device where `capturable` is True."""
        return self.parts.progress.steps

    @property
    def decision(self) -> Decision | None:
        """The last decision, None before the first; reads the device where `capturable` is True."""
        return self.parts.progress.decision

    @property
    def informed(self) -> bool:
        """True if the gradients of any step so far were finite; reads the device."""
        return bool(self.parts.progress.informed)

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had gradients that were not finite and left the scores unchanged; reads the device."""
        return self.parts.progress.nonfinite_steps

    @property
    def undecided_steps(self) -> int:
        """How many steps had no score to choose ranks by, so that the mask before stayed; reads the device."""
        return self.parts.progress.undecided_steps

    @property
    def skipped_steps(self) -> int:
        """How often a GradScaler kept the optimizer from stepping although it was called; no steps of the allocator."""
        return self.parts.progress.skipped_steps

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back."""
        return self.parts.progress.rollbacks

    def state_dict(self) -> dict[str, Tensor]:
        """Return the allocator's whole state, as copies: tensors by name, which safetensors and torch.save can write.

        With the model's and the optimizer's state_dict it continues a run, at any step, to the same bits. Settings,
        layers and counts are JSON in the uint8 tensor "metadata".
        """
        self._warn_if_idle()
        return pack_state(self.parts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place, and write the rank states.

        Raises:
            ValueError: Before any change, for a state of other settings, of another strategy or of other layers.
        """
        self._check_open()
        unpack_state(self.parts, state)
        self.parts.watchers.on_start(lambda: run_facts(self.parts))

    def snapshot(self) -> Snapshot:
        """Return a token that `rollback` goes back to, a copy of all it holds.

        In it are the allocator, its factors and rank states and, while attached to an optimizer, all that it trains
        besides, with its moments. Learning rates are not.
        """
        self._warn_if_idle()
        return take_snapshot(self.parts, self._optimizer)

    def rollback(self, token: Snapshot, why: str = "asked for") -> None:
        """Return to the moment of the snapshot, in place; a token can be reused.

        Gradients stay as they are: clear them before the next backward(). Data, learning rates and their scheduler go
        on from where they are.

        Args:
            token: What `snapshot` returned.
            why: The reason that observers are told.

        Raises:
            TypeError: For anything but a token of `snapshot`.
            ValueError: For another allocator's or optimizer's, before any change.
        """
        self._check_open()
        progress = self.parts.progress
        before, rollbacks = progress.steps, progress.rollbacks
        restore_snapshot(self.parts, self._optimizer, token)
        progress.count_rollback(rollbacks)
        self.parts.watchers.on_event(before, "rollback", {"to": progress.steps, "why": why})

    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._stepper.after_optimizer_step(found_overflow(optimizer)):
            self._call_back()

    def _call_back(self) -> None:
        for callback in self._callbacks:
            callback(self)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the allocator was closed: its layers may have another one; make a new one")

    def _warn_if_idle(self) -> None:
        idle = self.parts.idle
        if idle.idle():
            self.parts.watchers.warn_once("idle", idle.warning(self._handle is not None))
