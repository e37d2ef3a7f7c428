"""The factors that an AdaLoRA adapter of HF peft has in a model, found once, and flat buffers for their averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels.allocation.layers.gated import FACTORS
from peftkernels.backends.registry import kernels_for
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.rank_plan import RankPlan, RankState

_COMPUTABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ChosenParameters:
    """The parameters of a model that a filter on names chooses, in the order of `named_parameters`.

    Walking over all names takes longer than the kernels; `hold` says whether it has to be done again.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[str], bool]) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if wanted(name)]
        self.names = [name for name, _ in named]
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self._model = model
        self._branches = [module._modules for module in model.modules()]
        self._modules = _values(self._branches)
        self._shapes = [parameter.shape for parameter in self.parameters]
        paths = dict.fromkeys(name.rpartition(".")[0] for name in self.names)
        modules = dict(model.named_modules())
        # A model that gives its parameters names other than their paths cannot be watched.
        self._watched = all(path in modules for path in paths)
        self._owners = [modules[path]._parameters for path in paths] if self._watched else []
        self._keys = list(chain.from_iterable(self._owners))
        self._values = _values(self._owners)

    def hold(self, model: nn.Module) -> bool:
        """Return True if the model's modules and the parameters chosen from it are those of before, in their shapes."""
        return (
            self._watched
            and model is self._model
            and _same(_values(self._branches), self._modules)
            and list(chain.from_iterable(self._owners)) == self._keys
            and _same(_values(self._owners), self._values)
            and [parameter.shape for parameter in self.parameters] == self._shapes
        )


class AdapterFactors:
    """A, B and E of every layer that an adapter adapts, and flat buffers for their importance and its averages.

    Attributes:
        names: of A, B, E of the first layer, of A, B, E of the second, ….
        parameters: the factors themselves, in that order.
        gates: the E among them.
        gate_names: their names.
        layout: where every factor lies in the flat buffers.
        device: the same for all.
        dtype: the same for all.
        kernels: the allocator's kernels that serve them.
    """

    def __init__(self, chosen: ChosenParameters, layers: Sequence[Sequence[int]]) -> None:
        self._chosen = chosen
        places = [place for layer in layers for place in layer]
        self.names = [chosen.names[place] for place in places]
        self.parameters = [chosen.parameters[place] for place in places]
        self.gates, self.gate_names = self.parameters[2::3], self.names[2::3]
        shapes = zip(self.parameters[::3], self.parameters[1::3], strict=True)
        self.layout = FactorLayout.of([(a.shape[0], a.shape[1], b.shape[0]) for a, b in shapes])
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        self.kernels: AllocationKernels = kernels_for(self.device, torch.promote_types(self.dtype, torch.float32))

    @classmethod
    def find(cls, model: nn.Module, adapter: str) -> AdapterFactors | str:
        """What peft's filters on names find for an adapter, or why the kernels cannot work on it."""
        chosen = ChosenParameters(model, lambda name: "lora_" in name and adapter in name)
        layers: dict[str, dict[str, int]] = {}
        for place, name in enumerate(chosen.names):
            kinds = [kind for kind in FACTORS if f"{kind}.{adapter}" in name]
            if len(kinds) != 1:
                return f"{name} counts as a factor of adapter {adapter!r} by its name and is none"
            layers.setdefault(name.replace(kinds[0], "%s"), {})[kinds[0]] = place
        if not layers:
            return f"no factor of adapter {adapter!r} was found"
        for layer, places in layers.items():
            layer_name = layer.replace("%s", "lora_*")
            if len(places) != len(FACTORS):
                return f"{layer_name} has no {' and no '.join(kind for kind in FACTORS if kind not in places)}"
            a, b, e = (tuple(chosen.parameters[places[kind]].shape) for kind in FACTORS)
            if len(a) != 2 or len(b) != 2 or b[1] != a[0] or e != (a[0], 1):
                return f"{layer_name} has factors of shapes {a}, {b} and {e}"
        if (reason := cannot_compute(chosen.parameters)) is not None:
            return reason
        if len({parameter.dtype for parameter in chosen.parameters}) > 1:
            return "the factors are of several dtypes"
        if not all(parameter.is_contiguous() for parameter in chosen.parameters):
            return "a factor is not contiguous, which changes the order of peft's sums"
        return cls(chosen, [[places[kind] for kind in FACTORS] for places in layers.values()])

    def hold(self, model: nn.Module) -> bool:
        """Return True if the model still has these factors, in the shapes, dtype and memory of before."""
        parameters = self.parameters
        return (
            self._chosen.hold(model)
            and all(parameter.device == self.device and parameter.dtype == self.dtype for parameter in parameters)
            and all(parameter.is_contiguous() for parameter in parameters)
        )

    @cached_property
    def averages(self) -> tuple[Tensor, Tensor]:
        """Sensitivity and uncertainty, flat."""
        sensitivity = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        return sensitivity, torch.zeros_like(sensitivity)

    @cached_property
    def views(self) -> tuple[list[Tensor], list[Tensor]]:
        """Both averages by factor."""
        sensitivity, uncertainty = self.averages
        return self.layout.views(sensitivity), self.layout.views(uncertainty)

    @cached_property
    def _importance(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.averages[0]), torch.zeros_like(self.averages[0])

    @cached_property
    def importance_views(self) -> list[Tensor]:
        """What `measure_importance` wrote, by factor."""
        return self.layout.views(self._importance[0])

    def measure_importance(self, gradients: Sequence[Tensor]) -> None:
        """Write |p·g| of every factor, which must be finite."""
        # An average that forgets all that was before is what it averages, to the bit.
        self.kernels.update_averages(self.layout, self.parameters, gradients, *self._importance, 0.0, 0.0)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The score of every rank, (Σ r,), equal to peft's to the bit."""
        sensitivity, uncertainty = self.averages
        if self.kernels.name == "cpu":
            return self.kernels.rank_scores(self.layout, sensitivity, uncertainty)
        # The other kernels take the means of many factors at once, in an order of sums that need not be peft's.
        scores = self.layout.views(sensitivity * uncertainty)
        layers = zip(scores[::3], scores[1::3], scores[2::3], strict=True)
        return torch.cat([e.view(-1) + (a.mean(1) + b.mean(0)) for a, b, e in layers])

    def mask(self, keep: Tensor) -> None:
        """Zero the gates of the ranks that are not kept; keep: bool (Σ r,)."""
        self.kernels.apply(self.layout, keep, self.gates, self._plans, int(RankState.PROBE))

    @cached_property
    def _plans(self) -> list[RankPlan]:
        # The kernels write a plan with every mask; peft's layers have none, and these are not read.
        return [RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=self.device)) for r in self.layout.ranks]


def cannot_compute(factors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot compute with these factors, whatever their shapes; None where they can."""
    kinds = {type(factor) for factor in factors} - {nn.Parameter}
    if kinds:
        return f"a factor is a {kinds.pop().__name__}"
    if len({factor.device for factor in factors}) > 1:
        return "the factors are on several devices"
    if factors[0].is_meta:
        return "the factors are on the meta device"
    other = {factor.dtype for factor in factors}.difference(_COMPUTABLE)
    return f"a factor is {short(other.pop())}" if other else None


def short(dtype: torch.dtype) -> str:
    """A dtype's name in messages."""
    return str(dtype).removeprefix("torch.")


def _values(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    """What is in all of them, without a line of Python for each: there are hundreds."""
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))
