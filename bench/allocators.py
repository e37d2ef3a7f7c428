"""One step of AdaLoRA's rank allocation over many modules: ours beside HF peft's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

from peftkernels.allocation import AdaLoraAllocator
from peftkernels.nn import AdaLoRALinear

from . import lineup
from .cases import Case
from .verify import WrongResultError

_ADAPTER = "default"
# Halfway through a schedule so long that the budget hardly changes while steps are timed: scores and masks are computed
# in every one of them.
TOTAL_STEPS = 1_000_000
FACTORS = ("lora_A", "lora_B", "lora_E")


class AllocatorBench:
    """Both allocators on layers of one shape, with the same factors and gradients."""

    baseline = lineup.PEFT_ALLOCATOR

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.modules)
        linears = {f"layer{i}": nn.Linear(case.K, case.N, bias=False) for i in range(case.modules)}
        layers = {name: AdaLoRALinear.from_linear(linear, case.r) for name, linear in linears.items()}
        config = peft.AdaLoraConfig(
            init_r=case.r, target_r=max(1, case.r // 2), total_step=TOTAL_STEPS, target_modules=list(linears)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a model without a configuration
            model: Any = peft.get_peft_model(nn.ModuleDict(linears), config)
        self.case = case
        self._layers = layers
        self._peft = model.base_model
        self._ours = AdaLoraAllocator(layers, total_step=TOTAL_STEPS, target_r=max(1, case.r // 2))
        self._copy_factors_and_draw_gradients()
        self._step = TOTAL_STEPS // 2
        self._peft_step = TOTAL_STEPS // 2
        self.contestants: dict[str, Callable[[], None]] = {
            lineup.PEFT_ALLOCATOR: self._step_peft,
            lineup.OURS: self._step_ours,
        }

    @torch.no_grad()
    def _copy_factors_and_draw_gradients(self) -> None:
        for name, layer in self._layers.items():
            nn.init.normal_(layer.lora_E, std=0.05)
            theirs = self._peft.model[name]
            for factor in FACTORS:
                own, other = getattr(layer, factor), getattr(theirs, factor)[_ADAPTER]
                other.copy_(own)
                own.grad = torch.randn_like(own) * 1e-2
                other.grad = own.grad.clone()

    def _step_ours(self) -> None:
        self._step += 1
        self._ours.step(self._step)

    def _step_peft(self) -> None:
        self._peft_step += 1
        self._peft.update_and_allocate(self._peft_step)

    def prepare(self, name: str) -> None:
        """Nothing to do before a turn."""

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` steps."""
        step = self.contestants[name]
        for _ in range(repeats):
            step()

    def saved_bytes(self, name: str) -> None:
        """A step differentiates nothing."""

    def verify(self) -> None:
        """Both decide on the same ranks in their first steps; raises WrongResultError."""
        for _ in range(2):
            self._step_ours()
            self._step_peft()
        pattern = self._peft.peft_config[_ADAPTER].rank_pattern
        theirs = {name: list(pattern[f"{name}.lora_E.{_ADAPTER}"]) for name in self._layers}
        mine = self._ours.rank_pattern()
        different = [name for name in self._layers if mine[name] != theirs[name]]
        if different:
            raise WrongResultError(
                f"{self.case.id}: the allocators keep different ranks in {', '.join(different[:3])}; nothing was timed"
            )
