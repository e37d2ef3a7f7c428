"""Learning rates that follow the allocation: per module by its gates' gradients, and by the ranks that are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from peftkernels._module_names import names_without_wrappers
from peftkernels._reading import check_not_below_zero, check_text, shown
from peftkernels.allocation.layers.gated import FACTORS, find_gated_layers
from peftkernels.allocation.policies.module_average import ModuleGradientAverage
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.state_checks import check_names, within


def module_groups(model: nn.Module | Mapping[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Return one parameter group for an optimizer by gated layer that has ranks.

    Args:
        model: A module with AdaLoRALinear layers, or a mapping of names to such layers.
        **options: Options of every group, such as lr.

    Returns:
        Groups with lora_A, lora_B and lora_E of a layer as "params", and its name as "module".
    """
    return [
        {"params": [getattr(layer, factor) for factor in FACTORS], "module": name, **options}
        for name, layer in find_gated_layers(model).items()
        if layer.lora_E.shape[0]
    ]


class LearningRateMultipliers:
    """Multiplies the learning rate of each module's parameter group while its optimizer steps, and only then.

    Between steps `lr` is what the user and the schedulers made it: schedulers that compute a rate anew and those that
    multiply the last one work as ever, and saved optimizers hold the rate without the multiplier.

    A subclass gives `multipliers(allocator)`. `attach` comes after the allocator's; the factors of each module must be
    in one parameter group, or several, of their own (`module_groups` makes them).

    Args:
        every: How many steps lie between two calls of `multipliers`; on an accelerator reading them synchronises with
            the device.

    Raises:
        ValueError: Naming the argument.
    """

    def __init__(self, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: found {every!r}, expected an int of at least 1")
        self.every = every
        self._current: dict[str, float] = {}
        # The modules of the allocator that it is attached to.
        self._names: list[str] | None = None

    def multipliers(self, allocator: BudgetAllocator) -> dict[str, float] | None:
        """Return the multiplier of each module by name after a step; None to leave them as they are."""
        raise NotImplementedError

    @property
    def current(self) -> dict[str, float]:
        """The multipliers of the next step by module; empty while all are 1."""
        return dict(self._current)

    def attach(self, allocator: BudgetAllocator) -> None:
        """Act on the optimizer of `allocator` from now on.

        Raises:
            RuntimeError: Where the allocator is attached to none.
            ValueError: Where a parameter group has the factors of several modules, or of a module and other parameters,
                or where a state was loaded that names other modules.
        """
        optimizer = allocator.optimizer
        if optimizer is None:
            raise RuntimeError("the allocator is attached to no optimizer; call allocator.attach(optimizer) first")
        module_of = {id(getattr(layer, factor)): name for name, layer in allocator.layers.items() for factor in FACTORS}
        for number, group in enumerate(optimizer.param_groups):
            found = {module_of.get(id(parameter)) for parameter in group["params"]}
            if len(found) > 1 and found != {None}:
                shown = ", ".join(sorted(str(name) if name else "other parameters" for name in found)[:4])
                raise ValueError(
                    f"optimizer: found {shown} in parameter group {number}, expected one module in each; "
                    "peftkernels.allocation.policies.learning_rate.module_groups makes such groups"
                )

        names = list(allocator.layers)
        if self._names is None:
            # Multipliers from before the first of these can only be loaded ones.
            self._current = _with_own_names(self._current, names)
        self._names = names
        if optimizer not in _rates:
            _rates[optimizer] = _Rates(optimizer, module_of)
        _rates[optimizer].policies.append(self)
        allocator.add_callback(self)

    def __call__(self, allocator: BudgetAllocator) -> None:
        """Take in a step that the allocator has made; the allocator calls it."""
        if allocator.steps % self.every == 0:
            found = self.multipliers(allocator)
            if found is not None:
                self._current = found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, to be saved beside the allocator's state."""
        return {"multipliers": self.current}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, for anything else, and for modules that the allocator does not have; a policy
                that is attached later checks those when it is.
        """
        # A subclass may have more than these.
        check_names(state, self.state_dict())
        multipliers = state["multipliers"]
        where = "state: multipliers"
        if not isinstance(multipliers, Mapping):
            raise ValueError(f"{where}: found {shown(multipliers)}, expected a number for each module by name")
        for name, value in multipliers.items():
            check_not_below_zero(value, f"{where}[{check_text(name, where)!r}]")
        self._current = dict(multipliers) if self._names is None else _with_own_names(multipliers, self._names)


class _Rates:
    """The rates of one optimizer: multiplied by all policies just before it steps, as they were just after."""

    def __init__(self, optimizer: Optimizer, module_of: Mapping[int, str]) -> None:
        self.policies: list[LearningRateMultipliers] = []
        self._module_of = module_of
        self._saved: list[tuple[dict[str, Any], Any]] = []
        optimizer.register_step_pre_hook(self._multiply)
        optimizer.register_step_post_hook(self._restore)

    def _multiply(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step that failed has restored nothing.
        self._restore(optimizer, args, kwargs)
        for group in optimizer.param_groups:
            name = self._module_of.get(id(group["params"][0])) if group["params"] else None
            multiplier = math.prod(policy.current.get(name, 1.0) for policy in self.policies) if name else 1.0
            if multiplier != 1.0:
                self._saved.append((group, group["lr"]))
                group["lr"] = group["lr"] * multiplier

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._saved:
            group["lr"] = rate
        self._saved.clear()


_rates: WeakKeyDictionary[Optimizer, _Rates] = WeakKeyDictionary()


class LearningRatePriorities(LearningRateMultipliers):
    """Modules whose gates' gradients are larger than others' learn faster, within bounds, and the mean stays.

        m_k = clip(c·v_k, lowest, highest),  c such that mean_k m_k = 1

    with v_k the running mean of |∂e| of module k (`ModuleGradientAverage`, smoothing beta), frozen ones left out.
    Adam's steps do not depend on a gradient's size, so that under it every module moves as fast as any other, whatever
    it has to gain; the multiplier gives that back. It is this package's own rule, not a published one: compare it with
    the run without it. It moves the emphasis only, since the mean rate, and so the user's, stays.

    Args:
        beta: Smoothing of the gradients' mean, between 0 and 1.
        lowest: The lowest multiplier, from 0 to below 1.
        highest: The highest one, above 1.
        every: As for `LearningRateMultipliers`.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    def __init__(self, beta: float = 0.9, lowest: float = 0.5, highest: float = 2.0, every: int = 1) -> None:
        super().__init__(every)
        if not 0 <= lowest < 1 < highest < math.inf:
            raise ValueError(f"lowest, highest: found {lowest} and {highest}, expected 0 <= lowest < 1 < highest")
        self.lowest = lowest
        self.highest = highest
        self._average = ModuleGradientAverage(beta)

    def __call__(self, allocator: BudgetAllocator) -> None:
        self._average.update(allocator)
        super().__call__(allocator)

    def multipliers(self, allocator: BudgetAllocator) -> dict[str, float] | None:
        names = allocator.statistics.names
        frozen = allocator.frozen
        values = dict(zip(names, self._average.value.tolist(), strict=True))
        training = {name: value for name, value in values.items() if name not in frozen}
        if not any(training.values()):
            return None
        found = bounded_mean_one(list(training.values()), self.lowest, self.highest)
        return dict(zip(training, found, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "average": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_names(state, ("multipliers", "average"))
        average = ModuleGradientAverage(self._average.beta)
        with within("state: average"):
            average.load_state_dict(state["average"])
            if self._names is not None and average.modules not in (None, len(self._names)):
                raise ValueError(f"state['sums']: found {average.modules} modules, expected {len(self._names)}")
        if state["multipliers"] and average.modules is None:
            raise ValueError("state: average: found none beside multipliers, expected what they were computed from")
        super().load_state_dict(state)
        self._average = average


class LearningRateScale(LearningRateMultipliers):
    """Raises a module's learning rate as its ranks fall: m_k = min((r_k / kept_k)^power, highest).

    r_k is the module's initial rank and kept_k how many ranks the last mask kept; a module without any keeps m_k = 1.
    The layer's scale s does not change with pruning (rescaling the forward pass would move the outputs at every mask;
    AdaLoRA does not do it), so with fewer ranks the same learning rate moves the weight less. For gates with
    orthonormal factors, which is what the orthogonality term asks for, a step Δe changes the weight by

        ‖ΔW‖_F = s·‖Δe‖ = s·η·√kept     for steps of size η by gate, as Adam takes them

    so √(r/kept), power = 1/2, keeps the length of the step in the weight. It is the √r of rsLoRA (Kalajdzievski,
    arXiv 2312.03732), which finds that an adapter learns alike at all ranks with a scale of alpha/√r; here the step
    takes it over, since the scale stays. For SGD, whose steps carry the gradient's size, power 1/2 is too much.

    Args:
        power: Above 0, at most 1.
        highest: The highest multiplier, at least 1.
        every: As for `LearningRateMultipliers`.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
    """

    def __init__(self, power: float = 0.5, highest: float = 4.0, every: int = 1) -> None:
        super().__init__(every)
        if not 0 < power <= 1:
            raise ValueError(f"power: found {power}, expected a number above 0, at most 1")
        if not 1 <= highest < math.inf:
            raise ValueError(f"highest: found {highest}, expected a finite number of at least 1")
        self.power = power
        self.highest = highest

    def multipliers(self, allocator: BudgetAllocator) -> dict[str, float] | None:
        kept = {name: sum(own) for name, own in allocator.masks.pattern().items()}
        ranks = allocator.masks.ranks
        return {
            name: min((ranks[name] / count) ** self.power, self.highest)
            if count and name not in allocator.frozen
            else 1.0
            for name, count in kept.items()
        }


def _with_own_names(multipliers: Mapping[str, float], own: Sequence[str]) -> dict[str, float]:
    """Multipliers by the allocator's own names, from which saved ones may differ by what the model was wrapped in."""
    by_bare_name = dict(zip(names_without_wrappers(own), own, strict=True))
    found = {}
    for (name, value), bare in zip(multipliers.items(), names_without_wrappers(list(multipliers)), strict=True):
        if name not in own and bare not in by_bare_name:
            raise ValueError(f"state: multipliers[{name!r}]: found an unknown module, expected one of the allocator's")
        found[name if name in own else by_bare_name[bare]] = value
    return found


def bounded_mean_one(values: list[float], lowest: float, highest: float) -> list[float]:
    """Return clip(c·values, lowest, highest) with the c that makes their mean 1.

    Where so few values are above 0 that no c does, those are highest and the others take an equal rest.

    Args:
        values: At least 0, one above 0.
        lowest: Below 1.
        highest: Above 1.
    """
    given = torch.tensor(values, dtype=torch.float64)
    positive = given > 0
    most = torch.where(positive, highest, lowest)
    if float(most.mean()) < 1:
        rest = (len(values) - highest * int(positive.sum())) / int((~positive).sum())
        return [highest if value > 0 else rest for value in values]
    low, high = 0.0, highest / float(given[positive].min())
    for _ in range(200):
        middle = (low + high) / 2
        if float((middle * given).clamp(lowest, highest).mean()) < 1:
            low = middle
        else:
            high = middle
    found: list[float] = (high * given).clamp(lowest, highest).tolist()
    return found
