"""What happens at an optimizer step: statistics are updated, ranks are chosen, masks are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peftkernels.allocation.kernels import AllocationKernels, kernels_for
from peftkernels.allocation.layers.gated import FACTORS, GatedLayer, find_gated_layers
from peftkernels.allocation.layers.ownership import check_free, take_layers
from peftkernels.allocation.layers.sharding import find_shards
from peftkernels.allocation.run.deciding import choose_ranks
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.hook import IdleWatch, found_overflow
from peftkernels.allocation.run.masks import RankMasks, common_device
from peftkernels.allocation.run.progress import RunProgress
from peftkernels.allocation.run.settings import AllocatorSettings
from peftkernels.allocation.run.watchers import Watchers
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy
from peftkernels.ops.rank_plan import RankState


class Stepping(RunProgress):
    """The working half of `BudgetAllocator`, which offers the other: the phases of a run, step by step."""

    def _set_up(
        self,
        model: nn.Module | Mapping[str, Any],
        strategy: Strategy,
        settings: AllocatorSettings,
        costs: Mapping[str, float] | None,
        impl: str,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy: found {type(strategy).__name__}, expected a Strategy")
        if settings.capturable and not strategy.capturable:
            raise ValueError(f"capturable: found True, but the strategy {strategy.name!r} decides on the host")
        self.settings = settings
        self.strategy = strategy
        self._impl = impl
        found = find_gated_layers(model)
        check_free(found)
        self._sharded = find_shards(found)
        self._layers: Mapping[str, GatedLayer] = found if self._sharded is None else self._sharded.layers
        self._own: Mapping[str, GatedLayer] = found if self._sharded is None else self._sharded.own
        if settings.capturable and self._sharded is not None:
            raise ValueError("capturable: found True for layers that are sharded over processes, expected False")
        shapes = {
            name: (layer.lora_E.shape[0], layer.lora_B.shape[0], layer.lora_A.shape[1])
            for name, layer in self._own.items()
        }
        shares = settings.share_out(shapes, costs)
        device = common_device(self._own)
        kernels = kernels_for(device, Statistics.dtype_of(self._own), impl)
        self.statistics = Statistics(self._layers, kernels, shares, exact=settings.exact_budget, sharded=self._sharded)
        self.masks = RankMasks(self._layers, kernels, self._sharded)
        strategy.begin(self.statistics)
        if settings.capturable:
            self.statistics.prepare()
        self._watchers = Watchers()
        self._begin(settings, shares, device)
        self._handle: RemovableHandle | None = None
        self._optimizer: Optimizer | None = None
        self._watch = IdleWatch(self._own)
        self._forget_whole()
        self._modules: Mapping[str, GatedLayer] = found
        take_layers(self, found)
        self._closed = False

    def take_over(self, facts: Mapping[str, Any], keep: Tensor, decision: Decision | None, losses: Tensor) -> None:
        """Become what a checked state says; `load_state_dict` and `rollback` do it, nobody else should."""
        self._follow_device()
        self._released = facts["released"]
        self._rollbacks = facts["rollbacks"]
        self.statistics.forget()
        self.statistics.pending_losses = losses
        self._nonfinite.fill_(facts["nonfinite_steps"])
        # States of earlier versions have neither of these two.
        self._undecided.fill_(facts.get("undecided_steps", 0))
        self._informed.fill_(facts.get("informed", facts["nonfinite_steps"] < facts["step"]))
        self._skipped = facts["skipped_steps"]
        self._step = facts["step"]
        if self._on_device is not None:
            self._on_device.set(facts["step"], facts["skipped_steps"], 0 if decision is None else decision.step)
            if decision is not None and self._decision is not None:
                # A captured step goes on writing to these tensors.
                self._decision.scores.copy_(decision.scores)
                self._decision.thresholds.copy_(decision.thresholds)
                decision = self._decision
        if decision is not None or self._on_device is None:
            self._decision = None if decision is None else decision.to(self.masks.device)
        self._forget_whole()
        self.masks.restore(keep, facts["frozen"])
        self._write_states(mask=not facts["all_active"])
        self._watch.reset()

    def _made_step(self) -> None:
        """A step has been made on the host, masks and all."""
        raise NotImplementedError

    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        overflow = found_overflow(optimizer)
        if self._on_device is not None:
            self._advance_on_device(overflow)
        elif overflow is not None and bool(overflow):
            self._skipped += 1
            self._watch.reset()
            self.statistics.begin_step()
            # Told of the step that is tried again: what is told of the last one lies before a checkpoint made there.
            why = "the gradient scaler found an overflow; the optimizer did not step"
            self._watchers.tell(self._step + 1, "skipped", {"why": why})
        else:
            self._advance(None)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the allocator was closed: its layers may have another one; make a new one")

    def _advance(self, step: int | None) -> None:
        if step is None and self._on_device is not None:
            self._advance_on_device(None)
            return
        if step is None:
            step = self._step + 1
        elif not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"step: found {step!r} ({type(step).__name__}), expected an int or None")
        elif step <= self.steps:
            raise ValueError(f"step: found {step}, expected more than the last step, {self.steps}; steps count from 1")
        last = self.settings.last_allocation
        if self._on_device is not None:
            if step > last > self.steps:
                raise ValueError(f"step: found {step} after {self.steps}, expected at most {last} before the one after")
            self._on_device.step.fill_(step - 1)
            self._advance_on_device(None)
            return
        self.masks.check_writable()
        self._forget_whole()
        self._follow_device()
        self.statistics.begin_step(step)
        if step < last:
            self._update(step)
            if self.statistics.shares.due(step):
                self._decide(step)
            elif not self.masks.all_active:
                self.masks.write_all_active()
        elif not self._released:
            if self._step == 0:
                raise ValueError(f"step: found {step} as the first, expected less than {last}: there are no scores yet")
            self._released = True
            self._decide(step)
            self.strategy.release()
            _ = self.nonfinite_steps, self.undecided_steps
        else:
            self._write_states(mask=True)
        self._step = step
        self._watch.reset()
        self._forget_whole()
        if self._watchers.observers and self.statistics.loss is not None:
            self._watchers.tell(step, "loss", {"value": float(self.statistics.loss)})
        self._made_step()

    def _advance_on_device(self, overflow: Tensor | None) -> None:
        schedule, bus = self._on_device, self.statistics
        assert schedule is not None
        if common_device(self._layers) != self.masks.device:
            raise RuntimeError(
                f"the layers moved from {self.masks.device} to {common_device(self._layers)}: with capturable=True "
                "make the allocator where the layers are trained"
            )
        bus.begin_step()
        schedule.advance(overflow)
        bus.skip = schedule.skips_update(overflow)
        bus.device_budgets = schedule.budgets()
        self._update_strategy()
        assert bus.finite is not None
        self._nonfinite += ~(bus.finite | bus.skip)
        self._informed |= bus.finite & ~bus.skip
        scores = self.strategy.scores(bus)
        choice = choose_ranks(self.strategy, bus, self.masks, scores, 0, self._informed)
        due = schedule.decides(overflow)
        self._undecided += due & choice.left
        self._decision = schedule.remember(self._decision, due & choice.decided, scores, choice.thresholds)
        self.masks.take(torch.where(due, choice.keep, self.masks.keep))
        self.masks.write_masked(RankState.PROBE, schedule.masks())
        self._watch.reset()

    def _update_strategy(self) -> None:
        bus = self.statistics
        training = [layer for name, layer in self._own.items() if name not in self.masks.frozen]
        if training and not any(getattr(layer, factor).grad is not None for layer in training for factor in FACTORS):
            raise RuntimeError(
                "the allocator found no gradient on any lora_A, lora_B or lora_E: it must run after backward() and "
                "optimizer.step(), before the gradients are cleared"
            )
        self.strategy.update(bus)
        missing = [name for name in bus.missing if name.rpartition(".")[0] not in self.masks.frozen]
        if missing:
            shown = ", ".join(missing[:6]) + (" and others" if len(missing) > 6 else "")
            message = f"no gradient on {shown}: the scores count a missing gradient as zero"
            self._watchers.warn_once("missing", message)
        if bus.finite is None:
            bus.finite = bus.gates_finite()

    def _update(self, step: int) -> None:
        self._update_strategy()
        for details in self.strategy.moved():
            self._watchers.tell(step, "moved", details)
        finite = self.statistics.finite
        assert finite is not None
        self._nonfinite += ~finite
        self._informed |= finite
        if finite.device.type == "cpu" and not finite:
            self._watchers.tell(step, "skipped", {"why": "gradients are not finite; the scores stay as they were"})
            _ = self.nonfinite_steps

    def _decide(self, step: int) -> None:
        bus = self.statistics
        # A copy: strategies may give the tensor that they go on averaging in.
        scores = self.strategy.scores(bus).clone()
        choice = choose_ranks(self.strategy, bus, self.masks, scores, step, self._informed)
        self.masks.take(choice.keep)
        self._write_states(mask=True)
        self._undecided += choice.left
        if scores.device.type == "cpu" or self._watchers.observers:
            if choice.left:
                _ = self.undecided_steps
                why = f"the scores at step {step} are not finite or all the same; the mask before stays"
                self._watchers.tell(step, "skipped", {"why": why})
            if not choice.decided:
                return
        thresholds = choice.thresholds
        self._decision = Decision(step, self.statistics.shares.budget(step), scores, thresholds.clone())
        if self._watchers.observers:
            own = [part.tolist() for part in bus.per_layer(scores)]
            kept = list(self.masks.pattern().values())
            for observer in self._watchers.observers:
                observer.decided(step, self.statistics.shares.budget(step), bus.by_module(thresholds), own, kept)

    def _write_states(self, *, mask: bool) -> None:
        if mask:
            dead = self._released and self.settings.compact
            self.masks.write_masked(RankState.DEAD if dead else RankState.PROBE)
        else:
            self.masks.write_all_active()

    def _forget_whole(self) -> None:
        """Factors that were gathered from shards may have changed since, or are not needed any more."""
        if self._sharded is not None:
            self._sharded.forget()

    def _current_kernels(self) -> AllocationKernels:
        """The allocator's own kernels, which keep their tables, for the device where the layers are now."""
        if self._on_device is None:
            self._follow_device()
        return self.statistics.kernels

    def _follow_device(self) -> None:
        """The layers may have been moved since the last step."""
        device = common_device(self._own)
        if self.masks.device == device:
            return
        kernels = kernels_for(device, self.statistics.dtype, self._impl)
        self.statistics.kernels = kernels
        self.masks.to_(device, kernels)
        self._nonfinite, self._undecided = self._nonfinite.to(device), self._undecided.to(device)
        self._informed = self._informed.to(device)
        if self._decision is not None:
            self._decision = self._decision.to(device)
        if not self._released:
            tensors = {name: tensor.to(device) for name, tensor in self.strategy.tensors().items()}
            self.strategy.begin(self.statistics)
            self.strategy.load(tensors, self.statistics)
