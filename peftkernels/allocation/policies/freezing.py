"""Freezing layers that have nothing more to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkernels._reading import check_list, check_not_below_zero, check_whole
from peftkernels.allocation.policies.module_average import ModuleGradientAverage
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.state_checks import check_names, within

MODES = ("any", "prefix")


class LayerFreezing:
    """A callback that freezes a module whose gates' gradients have stayed below a part of their own peak.

        allocator.add_callback(LayerFreezing(below=0.1, patience=20, mode="prefix"))

    v_k is the running mean of |∂e| of module k (`ModuleGradientAverage`, smoothing beta) and its peak is the highest
    v_k so far, after `start` steps. Module k is ready when v_k < below · peak_k has held in `patience` steps in a row.

    - "any": ready modules are frozen wherever they are: their factors' gradients and optimizer steps are saved
    - "prefix": modules are frozen in the order of the model, each only after all those before it: nothing before the
      first module that trains then requires a gradient, and the backward pass ends there. It is the order of freezing
      known as layer-wise (Brock et al., FreezeOut, arXiv 1706.04983, by a fixed schedule; Liu et al., AutoFreeze, arXiv
      2102.01386, by gradients' change). Modules are named in the order in which the model has them: give the allocator
      layers in the order in which data flow through them

    Reads one number for each module from the device after every step. `state_dict` and `load_state_dict` are for a
    resume to the bit; what is frozen is in the allocator's state.

    Args:
        below: The part of its peak below which a module's gradients must stay.
        patience: Steps in a row in which they must.
        start: Steps before the first peak.
        mode: "any" or "prefix".
        keep: False makes a frozen module's ranks DEAD: they contribute nothing and cost nothing. True keeps those of
            the last mask, with what they have learned: for modules that are ready because they have converged, rather
            than because they are of no use.
        at_least: How many modules, the last ones, are never frozen.
        beta: Smoothing of the gradients' mean, between 0 and 1.

    Raises:
        ValueError: Naming the argument.
    """

    def __init__(
        self,
        *,
        below: float = 0.1,
        patience: int = 20,
        start: int = 10,
        mode: str = "any",
        keep: bool = False,
        at_least: int = 1,
        beta: float = 0.9,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: found {mode!r}, expected one of {', '.join(MODES)}")
        if not 0 < below < 1:
            raise ValueError(f"below: found {below}, expected a number above 0 and below 1")
        for name, value, lowest in (("patience", patience, 1), ("start", start, 0), ("at_least", at_least, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name}: found {value!r}, expected an int of at least {lowest}")
        self.below, self.patience, self.start = below, patience, start
        self.mode, self.keep, self.at_least = mode, keep, at_least
        self._average = ModuleGradientAverage(beta)
        self._peaks: list[float] = []
        self._low_steps: list[int] = []

    def __call__(self, allocator: BudgetAllocator) -> None:
        """Take in a step that the allocator has made; the allocator calls it."""
        self._average.update(allocator)
        names = allocator.statistics.names
        if not self._peaks:
            self._peaks, self._low_steps = [0.0] * len(names), [0] * len(names)
        if allocator.steps <= self.start:
            return
        for index, value in enumerate(self._average.value.tolist()):
            self._peaks[index] = max(self._peaks[index], value)
            low = value < self.below * self._peaks[index]
            self._low_steps[index] = self._low_steps[index] + 1 if low else 0
        frozen = set(allocator.frozen)
        for index, name in enumerate(names[: len(names) - self.at_least]):
            ready = self._low_steps[index] >= self.patience
            if name not in frozen and ready:
                allocator.freeze(name, drop=not self.keep)
            elif name not in frozen and self.mode == "prefix":
                break

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, to be saved beside the allocator's state."""
        return {"average": self._average.state_dict(), "peaks": list(self._peaks), "low_steps": list(self._low_steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, for anything else; the next step raises it where the state was saved for
                another number of modules.
        """
        check_names(state, ("average", "peaks", "low_steps"))
        average = ModuleGradientAverage(self._average.beta)
        with within("state: average"):
            average.load_state_dict(state["average"])
        peaks = [check_not_below_zero(peak, "state: peaks") for peak in check_list(state["peaks"], "state: peaks")]
        low_steps = [check_whole(low, "state: low_steps") for low in check_list(state["low_steps"], "state: low_steps")]
        modules = average.modules or 0
        for name, count in (("peaks", len(peaks)), ("low_steps", len(low_steps))):
            if count != modules:
                raise ValueError(f"state: {name}: found {count} modules, expected {modules} as in the average")
        self._average, self._peaks, self._low_steps = average, peaks, low_steps
