"""HF peft's AdaLoRA allocation on fused kernels: scores, masks and the orthogonality term, with peft's own results.

The classes of an `AdaLoraModel` and of its `RankAllocator` are exchanged for subclasses and back; parameters, budgets,
`rank_pattern` and the dictionaries of averages stay what peft makes them, so that a run can change sides at any step.
Scores, masks and averages equal peft's to the bit. The orthogonality term equals peft's up to the rounding of the
factors' dtype: it is summed in float32 where factors are of lower precision or autocast is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.adalora import layer as peft_layer
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from peftkernels.allocation.run.orthogonality import orthogonality
from peftkernels.integrations.peft.allocator_factors import AdapterFactors, ChosenParameters, cannot_compute, short
from peftkernels.integrations.peft.watch import AllocationWatch

ATTRIBUTE = "_peftkernels_allocator"
# What was found in the model, and what watches that its ranks are allocated; not part of copies and files.
_FOUND = "_peftkernels_found"
_WATCH = "_peftkernels_watch"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
# peft keeps averages in the factors' dtype, and the kernels in one of these.
_EXACT_DTYPES = (torch.float32, torch.float64)
_SHOWN = 6


@dataclass
class AllocatorRecord:
    """Calls of an allocation: updates of averages, masks, orthogonality terms.

    Attributes:
        served: ran on the kernels.
        fell_back: ran peft's own code.
        reasons: how many of these for which reason.
    """

    served: int = 0
    fell_back: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def serve(self) -> None:
        """Count a call that is served."""
        self.served += 1

    def fall_back(self, reason: str) -> None:
        """Count a call that runs peft's own code."""
        self.fell_back += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def reset(self) -> None:
        """Forget all counts."""
        self.served = self.fell_back = 0
        self.reasons.clear()


def apply_to_adalora_model(adalora_model: Any) -> None:
    """Let the allocation of `adalora_model`, the `base_model` of a `PeftModel`, run on the fused kernels, in place.

    What was served, and why the rest was not, is counted in `adalora_model._peftkernels_allocator`, an
    `AllocatorRecord`. A rank allocator that is set later is taken over at the next `update_and_allocate`.

    Raises:
        TypeError: it is not peft's own `AdaLoraModel`; a subclass may do something else and is refused too.
    """
    if type(adalora_model) is not AdaLoraModel:
        raise TypeError(f"adalora_model: found {_full_name(adalora_model)}, expected {_full_name(AdaLoraModel)}")
    adalora_model.__class__ = PeftKernelsAdaLoraModel
    adalora_model.__dict__[ATTRIBUTE] = AllocatorRecord()
    adalora_model._take_over_allocator()


def revert_adalora_model(adalora_model: Any) -> None:
    """Make `adalora_model` and its rank allocator what they were before `apply_to_adalora_model`; averages stay.

    Raises:
        TypeError: its allocation does not run on the kernels.
    """
    if type(adalora_model) is not PeftKernelsAdaLoraModel:
        found = _full_name(adalora_model)
        raise TypeError(f"adalora_model: found {found}, expected one that apply_to_adalora_model was called with")
    allocator = adalora_model.__dict__.get("rankallocator")
    if type(allocator) is PeftKernelsRankAllocator:
        for name in ("ipt", *_AVERAGES):
            getattr(allocator, name).update(_without_buffers(getattr(allocator, name)))
        allocator.__class__ = RankAllocator
        _clear(allocator)
    adalora_model.__class__ = AdaLoraModel
    _clear(adalora_model)


class PeftKernelsRankAllocator(RankAllocator):
    """peft's `RankAllocator` with its averages in flat buffers, updated, scored and masked by a few kernels.

    `ipt`, `exp_avg_ipt` and `exp_avg_unc` are peft's dictionaries by parameter name. The tensors in them are views of
    the buffers, which the next update writes to: clone what is to be kept as it is. Averages that others put there are
    taken in. Where the kernels would not give what peft gives to the bit (factors of lower precision,
    gradients that are not finite, …), peft's own methods run, and the reason is recorded.
    """

    def update_ipt(self, model: nn.Module) -> None:
        """Take factors and gradients into the averages, as they are now.

        Raises:
            TypeError: a factor has no gradient; the averages stay as they were.
        """
        factors = self._factors(model)
        reason = factors if isinstance(factors, str) else self._update(factors)
        if reason is not None:
            _record(self).fall_back(reason)
            super().update_ipt(model)
        else:
            _record(self).serve()

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Zero the gates of the ranks with the lowest scores, ties included; returns the rank pattern."""
        factors = self._factors(model)
        if not isinstance(factors, str):
            factors = self._cannot_mask(factors, budget) or factors
        if isinstance(factors, str):
            _record(self).fall_back(factors)
            return super().mask_to_budget(model, budget)
        layout = factors.layout
        masked = self.init_bgt - budget
        keep, _ = factors.kernels.select(factors.scores(), layout.total_rank - masked, False)
        factors.mask(keep)
        _record(self).serve()
        kept = keep.tolist()
        parts = zip(factors.gate_names, layout.rank_offsets, layout.ranks, strict=True)
        return {name: kept[start : start + r] for name, start, r in parts}

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool]]) -> None:
        """Zero the gates outside of a rank pattern, whose keys may be without the adapter's name."""
        factors = self._factors(model, in_any_dtype=True)
        keep = factors if isinstance(factors, str) else self._pattern(factors, rank_pattern)
        if isinstance(factors, str) or isinstance(keep, str):
            _record(self).fall_back(str(keep))
            super().mask_using_rank_pattern(model, rank_pattern)
            return
        factors.mask(torch.tensor(keep, dtype=torch.bool, device=factors.device))
        _record(self).serve()

    def reset_ipt(self) -> None:
        """Forget all averages, and free their memory."""
        super().reset_ipt()
        self.__dict__.pop(_FOUND, None)

    def __getstate__(self) -> dict[str, Any]:
        # Every view would be written with the whole buffer behind it.
        state = {name: value for name, value in self.__dict__.items() if name != _FOUND}
        return state | {name: _without_buffers(state[name]) for name in ("ipt", *_AVERAGES)}

    def _factors(self, model: nn.Module, *, in_any_dtype: bool = False) -> AdapterFactors | str:
        """The adapter's factors, looked for anew where the model has others than before; or why peft's code runs."""
        if peft_layer.deepspeed_config() is not None:
            return "DeepSpeed holds the gradients"
        for name in ("_element_score", "_combine_ipt"):
            if name in self.__dict__:
                return f"{name} of the rank allocator was replaced"
        found = self.__dict__.get(_FOUND)
        if found is None or found[0] != self.adapter_name or not found[1].hold(model):
            factors = AdapterFactors.find(model, self.adapter_name)
            if isinstance(factors, str):
                return factors
            found = self.__dict__[_FOUND] = self.adapter_name, factors
        if found[1].dtype not in _EXACT_DTYPES and not in_any_dtype:
            return f"the factors are {short(found[1].dtype)}, in which peft keeps and rounds their averages"
        return found[1]

    @torch.no_grad()
    def _update(self, factors: AdapterFactors) -> str | None:
        """Update the averages, or say why the kernels cannot; they are as they were then."""
        gradients = [parameter.grad for parameter in factors.parameters]
        missing = [name for name, gradient in zip(factors.names, gradients, strict=True) if gradient is None]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (" and others" if len(missing) > _SHOWN else "")
            raise TypeError(f"no gradient on {shown}: the ranks are allocated after backward() and before zero_grad()")
        given: list[Tensor] = [gradient for gradient in gradients if gradient is not None]
        if any(gradient.dtype != factors.dtype or gradient.layout != torch.strided for gradient in given):
            return f"the gradients are not all dense {short(factors.dtype)}, as the factors are"
        for name, *views in zip(factors.names, *factors.views, strict=True):
            if name not in self.ipt:
                for average, view in zip(_AVERAGES, views, strict=True):
                    getattr(self, average)[name] = view.zero_()
        if (reason := self._gather(factors)) is not None:
            return reason
        finite = factors.kernels.update_averages(
            factors.layout, factors.parameters, given, *factors.averages, self.beta1, self.beta2
        )
        if not finite:
            return "a product of a factor and its gradient is not finite"
        factors.measure_importance(given)
        self.ipt.update(zip(factors.names, factors.importance_views, strict=True))
        return None

    @torch.no_grad()
    def _gather(self, factors: AdapterFactors) -> str | None:
        """Let the averages lie in the flat buffers, whoever wrote them, or say why they cannot."""
        for average, views in zip(_AVERAGES, factors.views, strict=True):
            by_name = getattr(self, average)
            for name, view in zip(factors.names, views, strict=True):
                found = by_name.get(name)
                if found is view:
                    continue
                if not isinstance(found, Tensor) or found.shape != view.shape or found.dtype != view.dtype:
                    return f"{average} is not there in the shapes and dtype of the factors"
                if not found.is_contiguous():
                    return f"{average} is not contiguous, which changes the order of peft's sums"
                by_name[name] = view.copy_(found)
        return None

    def _cannot_mask(self, factors: AdapterFactors, budget: int) -> str | None:
        masked = self.init_bgt - budget
        if not isinstance(masked, int) or not 1 <= masked <= factors.layout.total_rank:
            return f"a budget of {budget} masks {masked} of {factors.layout.total_rank} ranks"
        return self._gather(factors)

    def _pattern(self, factors: AdapterFactors, rank_pattern: Any) -> list[bool] | str:
        """What a rank pattern keeps, gate after gate; or that it is one which only peft's code may take."""
        reason = "the rank pattern is not a list of bools for every gate"
        if not isinstance(rank_pattern, dict) or not rank_pattern:
            return reason
        names = factors.gate_names
        if self.adapter_name not in next(iter(rank_pattern)):
            names = [name.replace(f".{self.adapter_name}", "") for name in names]
        keep: list[bool] = []
        for name, r in zip(names, factors.layout.ranks, strict=True):
            part = rank_pattern.get(name)
            if not isinstance(part, list) or len(part) != r:
                return reason
            keep += part
        return keep if set(map(type, keep)) <= {bool} else reason


class PeftKernelsAdaLoraModel(AdaLoraModel):
    """peft's `AdaLoraModel` with a fused orthogonality term and rank allocator."""

    def _get_name(self) -> str:
        # Models print as they did.
        return AdaLoraModel.__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; where they have a loss, the orthogonality term of the trained adapter is added to it.

        The term can be differentiated once.

        Raises:
            ValueError: orth_reg_weight is negative.
        """
        if not isinstance(self, PeftKernelsAdaLoraModel):
            # The method was kept beyond `revert`, as accelerate's hooks keep it.
            return type(self).forward(self, *args, **kwargs)
        if peft_layer.deepspeed_config() is not None:
            _record(self).fall_back("DeepSpeed holds the factors")
            return super().forward(*args, **kwargs)
        if self.training:
            self._watch_training()
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), Tensor):
            self._add_term(outputs)
        return outputs

    @torch.compiler.disable
    def _add_term(self, outputs: Any) -> None:
        """Add the term to the loss of `outputs`; a compiled program breaks off here, as it does at peft's term."""
        adapter = self.trainable_adapter_name
        weight = self.peft_config[adapter].orth_reg_weight
        if weight < 0:
            raise ValueError(f"orth_reg_weight: found {weight}, expected at least 0")
        if weight == 0:
            return
        lora_A, lora_B = self._term_factors(adapter)
        reason = _cannot_sum(lora_A, lora_B)
        if reason is None:
            outputs.loss += orthogonality(lora_A, lora_B, weight)
            _record(self).serve()
            return
        _record(self).fall_back(reason)
        # peft's own term for outputs that are there already: the model must not run twice.
        inner = SimpleNamespace(forward=lambda: outputs, named_parameters=self.model.named_parameters)
        AdaLoraModel.forward(SimpleNamespace(model=inner, peft_config=self.peft_config, trainable_adapter_name=adapter))

    def update_and_allocate(self, global_step: int) -> None:
        """peft's step of budget and masks; `global_step` counts optimizer steps."""
        self._take_over_allocator()
        self._watch().allocated()
        super().update_and_allocate(global_step)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in (_FOUND, _WATCH)}

    @torch.compiler.disable
    def _watch_training(self) -> None:
        """Warn where training goes on without calls of `update_and_allocate`."""
        if torch.is_grad_enabled():
            self._watch().forward(self._term_factors(self.trainable_adapter_name)[0])

    def _watch(self) -> AllocationWatch:
        watch: AllocationWatch = self.__dict__.setdefault(_WATCH, AllocationWatch())
        return watch

    def _term_factors(self, adapter: str) -> tuple[list[Tensor], list[Tensor]]:
        """All lora_A and all lora_B that peft's filters on names find."""
        found = self.__dict__.get(_FOUND)
        if found is None or found[0] != adapter or not found[1].hold(self.model):
            found = adapter, ChosenParameters(self.model, lambda name: _in_term(name) and adapter in name)
            self.__dict__[_FOUND] = found
        lora_A: list[Tensor] = []
        lora_B: list[Tensor] = []
        for name, parameter in zip(found[1].names, found[1].parameters, strict=True):
            (lora_A if "lora_A" in name else lora_B).append(parameter)
        return lora_A, lora_B

    def _take_over_allocator(self) -> None:
        """The rank allocator may be another one by now; a model that is not trained has none."""
        allocator = self.__dict__.get("rankallocator")
        if type(allocator) is RankAllocator:
            allocator.__class__ = PeftKernelsRankAllocator
        if type(allocator) is PeftKernelsRankAllocator:
            allocator.__dict__[ATTRIBUTE] = _record(self)
        elif allocator is not None:
            _record(self).fall_back(f"the rank allocator is a {_full_name(allocator)}")


def _record(patched: Any) -> AllocatorRecord:
    return patched.__dict__.setdefault(ATTRIBUTE, AllocatorRecord())


def _clear(patched: Any) -> None:
    for name in (ATTRIBUTE, _FOUND, _WATCH):
        patched.__dict__.pop(name, None)


def _without_buffers(averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same averages, those that are part of a larger tensor as tensors of their own."""
    return {
        name: average.clone() if average.untyped_storage().nbytes() > average.nbytes else average
        for name, average in averages.items()
    }


def _in_term(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


def _cannot_sum(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot compute the orthogonality term of these factors."""
    if not lora_A or len(lora_A) != len(lora_B):
        return f"{len(lora_A)} lora_A and {len(lora_B)} lora_B were found"
    if any(factor.dim() != 2 for factor in (*lora_A, *lora_B)):
        return "the factors are not all matrices"
    return cannot_compute([*lora_A, *lora_B])


def _full_name(thing: Any) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
