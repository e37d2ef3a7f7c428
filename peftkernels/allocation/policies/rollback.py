"""Going back by itself: a policy that returns to an earlier step when a run leaves its band."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkernels._reading import check_flag, check_list, check_object, check_text, check_whole, shown
from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.policies.band import Band
from peftkernels.allocation.policies.snapshot_ring import Snapshots, check_count
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.json_tensor import METADATA, decode, encode
from peftkernels.allocation.run.state_checks import FACTS, check_names, check_settings, check_tensor, fact, part, within

_SNAPSHOTS = "snapshots."
_KEEP = "keep"
_FACTS = ("settings", "bands", "above", "learned", "events", "decided", "alarmed")


class RollbackPolicy:
    """Rolls a run back when its loss or the churn of its masks leaves its band.

        policy = RollbackPolicy(Snapshots(allocator, every=50, last=3))
        allocator.add_callback(policy)
        for batch in batches:
            loss = ...
            loss.backward()
            allocator.observe(loss)
            optimizer.step()
            optimizer.zero_grad()

    Watched are the loss given to `observe`, and with every decision the churn: ranks that changed sides, divided by
    the ranks kept. Each has a `Band` of its own. A loss that is not finite rolls back at once; otherwise `patience`
    numbers in a row must be above the band. Numbers above it are not learned from, and no snapshot is taken meanwhile.

    The run returns to the newest snapshot taken two steps or more before the first number above the band, since the
    harm may have been done by the step before; where there is none, one step before. If an alarm comes again before
    the run has passed the step of the last one, that snapshot is given up for an older one. What was learned by the
    bands goes back with the run. The data does not: the batches that follow are new ones.

    Observers are told a "rollback" with the reason in words, or an "alarm" where there was no way back; `explain` has
    them all. Reading loss and churn synchronises with the device. In a parallel run every process must observe the
    same loss, that is, its mean over the processes.

    Args:
        snapshots: Where to go back to. The policy calls it: do not add it as a callback too.
        loss_width: The loss's band, in deviations above the mean; None does not watch the loss.
        loss_slack: The least distance of the limit from the mean, as a part of the mean.
        churn_width: The churn's band, likewise; None does not watch it.
        churn_slack: The least distance of the limit from the mean churn.
        beta: Smoothing of mean and deviation, between 0 and 1.
        warmup: Numbers from which a band is learned first.
        patience: Numbers in a row above a band that roll back.
        limit: The most rollbacks; after them an alarm is told and warned about.
        learning_rate_factor: What every learning rate of the optimizer is multiplied with at a rollback. A scheduler
            that computes rates from the start, such as LambdaLR, writes over it.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        *,
        loss_width: float | None = 6.0,
        loss_slack: float = 0.25,
        churn_width: float | None = 6.0,
        churn_slack: float = 0.25,
        beta: float = 0.95,
        warmup: int = 20,
        patience: int = 2,
        limit: int = 3,
        learning_rate_factor: float = 1.0,
    ) -> None:
        if not isinstance(snapshots, Snapshots):
            raise TypeError(f"snapshots: found {type(snapshots).__name__}, expected Snapshots of the allocator")
        if loss_width is None and churn_width is None:
            raise ValueError("loss_width: found None beside churn_width None, expected one of the two to be watched")
        for name, value in (("loss_width", loss_width), ("churn_width", churn_width)):
            if value is not None:
                _check_above_zero(name, value)
        for name, value in (("loss_slack", loss_slack), ("churn_slack", churn_slack)):
            _check_above_zero(name, value)
        check_smoothing("beta", beta)
        for name, count in (("warmup", warmup), ("patience", patience), ("limit", limit)):
            check_count(name, count)
        _check_above_zero("learning_rate_factor", learning_rate_factor)
        if learning_rate_factor > 1:
            raise ValueError(f"learning_rate_factor: found {learning_rate_factor}, expected at most 1")
        self.snapshots = snapshots
        self.patience = patience
        self.limit = limit
        self.learning_rate_factor = learning_rate_factor
        self._settings = {
            "loss_width": loss_width,
            "loss_slack": loss_slack,
            "churn_width": churn_width,
            "churn_slack": churn_slack,
            "beta": beta,
            "warmup": warmup,
            "patience": patience,
            "limit": limit,
            "learning_rate_factor": learning_rate_factor,
        }
        self._bands: dict[str, Band] = {}
        if loss_width is not None:
            self._bands["loss"] = Band(width=loss_width, warmup=warmup, beta=beta, relative=loss_slack)
        if churn_width is not None:
            self._bands["churn"] = Band(width=churn_width, warmup=warmup, beta=beta, absolute=churn_slack)
        # The steps of the numbers in a row that were above each band.
        self._above: dict[str, list[int]] = {name: [] for name in self._bands}
        # What the bands had learned at each snapshot.
        self._learned: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        # True if the last alarm found no way back; nothing is said again until the run is in its bands.
        self._alarmed = False
        self._decided: int | None = None
        self._keep = snapshots.allocator.masks.keep.clone()
        self._look_at_masks(snapshots.allocator)

    @property
    def rollbacks(self) -> int:
        """Rollbacks by this policy so far."""
        return sum(event["to"] is not None for event in self._events)

    def explain(self) -> str:
        """Return every alarm in words, one a line."""
        return "\n".join(f"step {event['step']}: {event['why']}" for event in self._events)

    def __call__(self, allocator: BudgetAllocator) -> None:
        """Take in a step that the allocator has made; the allocator calls it."""
        if allocator is not self.snapshots.allocator:
            raise ValueError("allocator: found another one than the snapshots are of")
        step = allocator.steps
        why: list[str] = []
        for name, value in self._numbers(allocator).items():
            band, above = self._bands[name], self._above[name]
            finite = math.isfinite(value)
            if finite and value <= band.limit:
                above.clear()
                band.take(value)
                continue
            above.append(step)
            if not finite:
                why.append(f"{name} {value} is not finite")
            elif len(above) >= self.patience:
                times = "" if self.patience == 1 else f" for the {len(above)}. time in a row"
                why.append(f"{name} {value:.4g} left its band ({band}){times}")
        if why:
            self._go_back(allocator, step, " and ".join(why))
        elif not any(self._above.values()):
            self._alarmed = False
            self.snapshots(allocator)
            learned = {name: band.state() for name, band in self._bands.items()}
            kept = self.snapshots.steps
            if step in kept:
                self._learned[step] = learned
            self._learned = {own: learned for own, learned in self._learned.items() if own in kept}

    def _numbers(self, allocator: BudgetAllocator) -> dict[str, float]:
        """What this step adds to what is watched."""
        numbers = {}
        if "loss" in self._bands:
            loss = allocator.statistics.loss
            if loss is None:
                raise RuntimeError(
                    "RollbackPolicy watches the loss and was given none: call allocator.observe(loss) before every "
                    "optimizer.step(), or pass loss_width=None"
                )
            numbers["loss"] = float(loss)
        before, decided = self._keep, self._decided
        self._look_at_masks(allocator)
        if "churn" in self._bands and self._decided != decided:
            changed = int((self._keep != before).sum())
            numbers["churn"] = changed / max(1, int(self._keep.sum()))
        return numbers

    def _look_at_masks(self, allocator: BudgetAllocator) -> None:
        decision = allocator.decision
        self._decided = None if decision is None else decision.step
        self._keep = allocator.masks.keep.clone()

    def _go_back(self, allocator: BudgetAllocator, step: int, why: str) -> None:
        first = min(min(above, default=step) for above in self._above.values())
        returned = [event for event in self._events if event["to"] is not None]
        if returned and first <= returned[-1]["step"] and len(self._before(first)) > 1:
            self.snapshots.drop(returned[-1]["to"])
        candidates = self._before(first - 1) or self._before(first)
        for above in self._above.values():
            above.clear()
        if not candidates or len(returned) >= self.limit:
            if self._alarmed:
                return
            self._alarmed = True
            what = f"no rollback is left of {self.limit}" if candidates else f"no snapshot from before step {first}"
            self._events.append({"step": step, "to": None, "why": f"{why}; {what}"})
            allocator.notify("alarm", {"why": f"{why}; {what}"})
            warnings.warn(f"step {step}: {why}; {what}", UserWarning, stacklevel=2)
            return
        target = candidates[-1]
        why = f"{why}; back to step {target}"
        if self.learning_rate_factor != 1 and allocator.optimizer is not None:
            why += f", learning rates times {self.learning_rate_factor:g}"
            for group in allocator.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(self.learning_rate_factor)
                else:
                    group["lr"] *= self.learning_rate_factor
        self._events.append({"step": step, "to": target, "why": why})
        self.snapshots.to(target, why)
        for name, learned in self._learned[target].items():
            self._bands[name].load(learned)
        self._look_at_masks(allocator)

    def _before(self, step: int) -> list[int]:
        """The snapshots from before a step, oldest first."""
        return [kept for kept in self.snapshots.steps if kept < step and kept in self._learned]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the policy's state with its snapshots: tensors by name, which safetensors and torch.save can write."""
        facts = {
            "settings": self._settings,
            "bands": {name: band.state() for name, band in self._bands.items()},
            "above": self._above,
            "learned": list(self._learned.items()),
            "events": self._events,
            "decided": self._decided,
            "alarmed": self._alarmed,
        }
        snapshots = {_SNAPSHOTS + name: value for name, value in self.snapshots.state_dict().items()}
        return {METADATA: encode(facts), _KEEP: self._keep.clone(), **snapshots}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, for a state of other settings, of snapshots that do not belong to the
                allocator, or with anything missing or wrong.
        """
        facts = decode(state)
        check_names(facts, _FACTS, FACTS)
        check_settings(check_object(facts["settings"], fact("settings")), self._settings, "a policy")
        learned = self._check_bands(facts)
        _check_history(facts)
        own = part(state, _SNAPSHOTS)
        check_names(state, (METADATA, _KEEP, *(_SNAPSHOTS + name for name in own)))
        with within("state: snapshots"):
            snapshots = self.snapshots.read(own)
        keep = check_tensor(state, _KEEP, self._keep.shape, self._keep.dtype)
        self.snapshots.keep(snapshots)
        for name, band in facts["bands"].items():
            self._bands[name].load(band)
        self._above = facts["above"]
        self._learned = learned
        self._events = facts["events"]
        self._decided = facts["decided"]
        self._alarmed = facts["alarmed"]
        self._keep = keep.to(self._keep.device).clone()

    def _check_bands(self, facts: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What the facts of a state say of the bands; returns what they had learned at each snapshot, by its step."""
        check_names(facts["bands"], self._bands, fact("bands"))
        for name, band in facts["bands"].items():
            Band.check(band, fact(f"bands.{name}"))
        check_names(facts["above"], self._bands, fact("above"))
        for name, steps in facts["above"].items():
            for step in check_list(steps, fact(f"above.{name}")):
                check_whole(step, fact(f"above.{name}"))
        learned: dict[int, dict[str, Any]] = {}
        for pair in check_list(facts["learned"], fact("learned")):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{fact('learned')}: found {shown(pair)}, expected a step and what was learned by it")
            step = check_whole(pair[0], fact("learned"))
            if step in learned:
                raise ValueError(f"{fact('learned')}: found step {step} twice, expected it once")
            check_names(pair[1], self._bands, fact(f"learned.{step}"))
            for name, band in pair[1].items():
                Band.check(band, fact(f"learned.{step}.{name}"))
            learned[step] = pair[1]
        return learned


def _check_history(facts: Mapping[str, Any]) -> None:
    """What the facts of a state say of the run so far."""
    for place, event in enumerate(check_list(facts["events"], fact("events"))):
        where = fact(f"events[{place}]")
        check_names(event, ("step", "to", "why"), where)
        check_whole(event["step"], f"{where}.step")
        if event["to"] is not None:
            check_whole(event["to"], f"{where}.to", most=event["step"])
        check_text(event["why"], f"{where}.why")
    if facts["decided"] is not None:
        check_whole(facts["decided"], fact("decided"))
    check_flag(facts["alarmed"], fact("alarmed"))


def _check_above_zero(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: found {value}, expected a finite number above 0")
