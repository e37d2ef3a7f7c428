"""The allocator: runs a strategy after every optimizer step and turns its scores into rank plans under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftkernels.allocation.budget.budgets import Budget
from peftkernels.allocation.layers.gated import factors_of
from peftkernels.allocation.layers.ownership import leave_layers
from peftkernels.allocation.layers.sharding import check_not_sharded_since
from peftkernels.allocation.logs.observer import Observer
from peftkernels.allocation.run.explain import explain_decision, run_facts
from peftkernels.allocation.run.hook import run_after_step
from peftkernels.allocation.run.orthogonality import add_orthogonality_gradient, orthogonality
from peftkernels.allocation.run.report import AllocationReport
from peftkernels.allocation.run.settings import AllocatorSettings
from peftkernels.allocation.run.snapshot import Snapshot, restore_snapshot, take_snapshot
from peftkernels.allocation.run.state import pack_state, unpack_state
from peftkernels.allocation.run.stepping import Stepping
from peftkernels.allocation.strategies.strategy import Strategy


class BudgetAllocator(Stepping):
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

    Arguments:
        model            a module with AdaLoRALinear layers, or a mapping of names to such layers, all on one device
        strategy         the rule that scores ranks: `peftkernels.allocation.strategies`
        total_step       optimizer steps of the whole run
        target_r         average rank per layer at the end, below every layer's initial rank; 8 without a budget
        budget           in place of target_r: a `Budget` in ranks, parameters, microseconds or bytes, with groups
        costs            cost of one rank by layer name, for a budget in microseconds or bytes
        tinit            steps before the first mask
        tfinal           steps at the end in which the ranks stay as they are
        deltaT           steps between two masks
        orth_reg_weight  weight w of the orthogonality term
        exact_budget     False: ranks that tie with the threshold are all masked, as in peft, unless none would stay.
                         True: exactly the budget stays; of ranks that tie, those of earlier layers and lower index stay
        compact          True: after step total_step - tfinal masked ranks are DEAD instead of PROBE. They then cost
                         nothing, and the run departs from peft's: their gates get no gradient, so the norm that
                         gradient clipping sees is smaller, and the orthogonality term covers the kept ranks only
        capturable       True: step count, schedule and masks live on the device, so that a CUDA graph may capture
                         `step` once and replay it for every optimizer step; `compact` is not available then
        impl             who computes a step: "eager", "cpu" (C++), "triton", or "auto" for the fastest that can

    States of the ranks: all ACTIVE from the moment the allocator is made; after a mask, masked ranks are PROBE until
    the next optimizer step, which moves their gates away from zero; between masks (deltaT > 1) every rank is ACTIVE.
    Ranks of a layer given to `freeze` are DEAD from then on.

    A step whose gradients are not finite leaves the statistics unchanged, is counted and warned about once; on an
    accelerator the count is read back, and the warning given, only at the last allocation and when the state is saved
    or explained. Judged are the gradients that the strategy looks at, those of the gates at least. A rank whose score
    is not finite stays as the mask before has it. Where that is so for all ranks of a budget, where their scores are
    all the same, or where no step so far had finite gradients, nothing is decided, the mask before stays, and the step
    is counted in `undecided_steps` and warned about once. This guards what the allocator decides by, not the weights:
    the optimizer has run by then, and has written such gradients into weights and moments unless something
    before it did not let it, as `GradScaler` and `clip_grad_norm_(error_if_nonfinite=True)` do. `RollbackPolicy` takes
    the weights back too. A step that a GradScaler skips is no step here either: most optimizers are not called then;
    fused ones are, and the call is counted in `skipped_steps`; to know, the host reads the scaler's flag after each of
    their steps, but where `capturable` is True. Besides that, and what observers and callbacks ask for, no step makes
    the host wait for an accelerator before the last allocation.

    A factor without a gradient counts as one with gradient zero and is warned about once; if no factor has one, `step`
    raises RuntimeError. Raises TypeError or ValueError naming the argument found wrong, and ValueError for a layer that
    has an allocator already: `close` hands layers over.
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
        self._set_up(model, strategy, settings, costs, impl)

    def attach(self, optimizer: Optimizer) -> None:
        """Run after every `optimizer.step()` from now on, until `detach`.

        Raises RuntimeError when attached already, when closed or when the layers were sharded since the allocator was
        made, TypeError for anything but an optimizer, and ValueError, naming them, where lora_A, lora_B or lora_E of a
        layer that is not frozen are not among the optimizer's parameters.
        """
        self._check_open()
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer already; call detach() first")
        if self._sharded is None:
            check_not_sharded_since(self._own)
        run = self._after_optimizer_step
        self._handle, self._optimizer = run_after_step(optimizer, run, self._own, self.frozen)

    def detach(self) -> None:
        """Undo `attach`; does nothing when not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = self._optimizer = None

    def close(self) -> None:
        """Undo `attach`, and leave the layers, with their ranks as they are, to another allocator.

        A layer has one allocator at a time, and gives it up when that is closed or no longer held by anybody. After
        this the allocator can be asked and saved; what would change a layer raises RuntimeError. Does nothing when
        closed.
        """
        self.detach()
        leave_layers(self, self._modules)
        self._closed = True

    def observe(self, loss: Tensor | float) -> None:
        """Give the loss of the step that is being made, before `optimizer.step()`, to those who need it.

        Strategies that learn from the loss, rollback policies and logs do; AdaLoRA itself does not. Several calls
        before one optimizer step, as with accumulated batches, count as their mean. Give the loss itself, not the one
        that a GradScaler scaled. Losses of a step for which a scaler did not call the optimizer count with the next.
        """
        self.statistics.take_loss(loss)

    def regularization(self) -> Tensor:
        """The orthogonality term w/(2n)·Σ(‖A·Aᵀ-I‖_F + ‖Bᵀ·B-I‖_F) over the n layers, 0-dim, to be added to the loss.

        Masked ranks are included, as in peft, except DEAD ones (`compact=True` after the last allocation, frozen
        layers). `add_regularization_gradient` does the same for less.
        """
        self._warn_if_idle()
        if self.settings.orth_reg_weight == 0:
            return torch.zeros((), device=self.masks.device)
        layers, sharded = self._layers.values(), self._sharded
        return orthogonality(
            factors_of(layers, "lora_A") if sharded is None else sharded.differentiable("lora_A"),
            factors_of(layers, "lora_B") if sharded is None else sharded.differentiable("lora_B"),
            self.settings.orth_reg_weight,
            self._living(),
            self._current_kernels(),
        )

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
        if self.settings.orth_reg_weight == 0:
            return torch.zeros((), device=self.masks.device)
        self._forget_whole()
        term = add_orthogonality_gradient(
            factors_of(self._layers.values(), "lora_A"),
            factors_of(self._layers.values(), "lora_B"),
            self.settings.orth_reg_weight,
            self._living(),
            scale,
            self._current_kernels(),
        )
        if self._sharded is not None:
            self._sharded.store_gradients("lora_A")
            self._sharded.store_gradients("lora_B")
            self._forget_whole()
        return term

    def step(self, step: int | None = None) -> None:
        """Advance to optimizer step `step` (the next one when None), for loops without an optimizer hook.

        Call it after `optimizer.step()` and before the gradients are cleared. Raises RuntimeError when attached,
        since the hook calls it then, and ValueError for a step that is not after the last one; steps count from 1.
        Where `capturable` is True a step that is given is read by the host, and may not pass over the last allocation.
        """
        self._check_open()
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer, whose hook steps it; call detach() first")
        self._advance(step)

    def budget(self, step: int) -> float:
        """What the schedule allows after optimizer step `step`, over all layers, in the budget's unit (an int for
        ranks and parameters)."""
        return self.statistics.shares.budget(step)

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For every layer by name, which ranks the last mask kept; all of them before the first mask."""
        self._warn_if_idle()
        return self.masks.pattern()

    def freeze(self, name: str, *, drop: bool = True) -> None:
        """Take a layer out of the fine-tuning: its factors no longer require grad, and its ranks no longer change.

        drop=True keeps none of its ranks: all are DEAD, contribute nothing and cost nothing, and the budget belongs to
        the other layers. drop=False keeps the ranks of the last mask (all before the first), with what they contribute;
        they go on counting against the budget, and the other layers get what remains of it. Frozen layers at the input
        of a model end the backward pass early, since nothing before them requires a gradient. An optimizer leaves
        frozen factors alone, weight decay included, since they have no gradient. Only `rollback` and `load_state_dict`
        undo it.

        Every process of a parallel run must freeze the same layers at the same step. DistributedDataParallel expects a
        gradient of all that required one when it was made: freeze before that, or give it find_unused_parameters=True.
        Where `capturable` is True, freeze before the step is captured, or capture it anew.

        Raises ValueError for an unknown layer; does nothing for one that is frozen.
        """
        if name not in self._layers:
            names = list(self._layers)
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise ValueError(f"name: found {name!r}, expected one of {shown}")
        self._check_open()
        if name in self.masks.frozen:
            return
        self.masks.check_writable()
        self._forget_whole()
        self.masks.freeze((*self.masks.frozen, name))
        if drop:
            self.masks.drop(name)
        self._write_states(mask=not self.all_active)
        self.statistics.forget()
        self.tell("frozen", {"module": name})

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers given to `freeze`."""
        return self.masks.frozen

    def add_observer(self, observer: Observer) -> None:
        """Tell `observer` from now on what is decided; it is told at once where the run stands.

        Reading a decision synchronises with the device; where `capturable` is True an observer is refused (ValueError).
        """
        self._refuse_if_captured("observer", "tells nothing to")
        self._watchers.observers.append(observer)
        observer.started(run_facts(self))

    def add_callback(self, callback: Callable[[BudgetAllocator], None]) -> None:
        """Call `callback` with this allocator after every step it makes: for policies that watch a run and act on it.

        Refused (ValueError) where `capturable` is True.
        """
        self._refuse_if_captured("callback", "calls nothing on")
        self._watchers.callbacks.append(callback)

    def tell(self, kind: str, details: Mapping[str, Any]) -> None:
        """Tell the observers that something happened, for policies and strategies: `Observer.happened` says what."""
        self._watchers.tell(self._step, kind, details)

    def explain(self) -> AllocationReport:
        """The last decision, layer by layer: ranks kept, scores, margin to the threshold, and why."""
        self._warn_if_idle()
        return explain_decision(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer the allocator is attached to."""
        return self._optimizer

    @property
    def sharded(self) -> bool:
        """Whether the layers' factors are sharded over processes, as FSDP2 does it."""
        return self._sharded is not None

    @property
    def all_active(self) -> bool:
        """Whether every rank trains, as before the first mask and between two; reads the device where `capturable`."""
        return self.masks.all_active if self._on_device is None else not bool(self._on_device.masks())

    def state_dict(self) -> dict[str, Tensor]:
        """The allocator's whole state, as copies: tensors by name, which safetensors and torch.save can write.

        With the model's and the optimizer's state_dict it continues a run, at any step, to the same bits. Settings,
        layers and counts are JSON in the uint8 tensor "metadata".
        """
        self._warn_if_idle()
        return pack_state(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place, and write the rank states.

        Raises ValueError, before any change, for a state of other settings, of another strategy or of other layers.
        """
        self._check_open()
        unpack_state(self, state)
        self._watchers.started(lambda: run_facts(self))

    def snapshot(self) -> Snapshot:
        """A token that `rollback` returns to, a copy of all it holds: the allocator, its factors and rank states and,
        while attached to an optimizer, all that it trains besides, with its moments. Learning rates are not in it."""
        return take_snapshot(self)

    def rollback(self, token: Snapshot, why: str = "asked for") -> None:
        """Return to the moment of the snapshot, in place; a token can be reused. `why` goes to the observers.

        Gradients stay as they are: clear them before the next backward(). Data, learning rates and their scheduler go
        on from where they are. Raises TypeError for anything but a token of `snapshot`, ValueError for another
        allocator's or optimizer's, before any change.
        """
        self._check_open()
        before, rollbacks = self.steps, self._rollbacks
        restore_snapshot(self, token)
        self._rollbacks = rollbacks + 1
        self._watchers.tell(before, "rollback", {"to": self.steps, "why": why})

    def _made_step(self) -> None:
        self._watchers.call(self)

    def _living(self) -> tuple[Tensor, ...] | None:
        """The ranks of each layer that the orthogonality term covers, None for all."""
        compact = self._released and self.settings.compact
        return self.masks.living(dead=compact) if compact or self.masks.frozen else None

    def _refuse_if_captured(self, argument: str, what: str) -> None:
        if self._on_device is not None:
            raise ValueError(
                f"{argument}: a captured step {what} the host; expected an allocator with capturable=False"
            )

    def _warn_if_idle(self) -> None:
        if self._watch.idle():
            self._watchers.warn_once("idle", self._watch.warning(self._handle is not None))
