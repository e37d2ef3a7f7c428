"""One step of AdaLoRA's rank allocation over many modules, with or without its orthogonality term, beside HF peft's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn

from bench import lineup
from bench.cases import ORTHOGONALITY, Case
from bench.peers import frozen_linear
from bench.verify import WrongResultError
from peftkernels.allocation import AdaLoraAllocator
from peftkernels.nn import AdaLoRALinear

_ADAPTER = "default"
# Halfway through a schedule so long that the budget hardly changes while steps are timed: scores and masks are computed
# in every one of them.
TOTAL_STEPS = 1_000_000
FACTORS = ("lora_A", "lora_B", "lora_E")


class _Linears(nn.ModuleDict):
    """Layers without a task: peft's model adds its orthogonality term to this loss."""

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros((), device=next(self.parameters()).device))


class AllocatorBench:
    """Both allocators on layers of one shape, with the same factors and gradients.

    place: where the layers lie; the CPU without. They share one frozen weight, which takes no part.
    """

    baseline = lineup.PEFT_ALLOCATOR

    def __init__(self, case: Case, place: torch.device | None = None) -> None:
        torch.manual_seed(case.modules)
        weight = torch.zeros(case.N, case.K, device=place)
        linears = {f"layer{i}": frozen_linear(weight, None) for i in range(case.modules)}
        layers = {name: AdaLoRALinear.from_linear(linear, case.r) for name, linear in linears.items()}
        config = peft.AdaLoraConfig(
            init_r=case.r, target_r=max(1, case.r // 2), total_step=TOTAL_STEPS, target_modules=list(linears)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a model without a configuration
            model: Any = peft.get_peft_model(_Linears(linears), config)
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
        if case.direction == ORTHOGONALITY:
            self.contestants = {
                lineup.PEFT_ALLOCATOR: self._step_peft_with_term,
                lineup.OURS: self._step_ours_with_term,
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

    @property
    def kernels(self) -> str:
        """Who computes ours."""
        return self._ours.statistics.kernels.name

    def _step_ours(self) -> None:
        self._step += 1
        self._ours.step(self._step)

    def _step_peft(self) -> None:
        self._peft_step += 1
        self._peft.update_and_allocate(self._peft_step)

    def _step_ours_with_term(self) -> None:
        self._ours.add_regularization_gradient()
        self._step_ours()

    def _step_peft_with_term(self) -> None:
        self._peft().loss.backward()
        self._step_peft()

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
        """Both decide on the same ranks in their first steps, and their terms agree; raises WrongResultError."""
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
        if self.case.direction == ORTHOGONALITY:
            self._verify_term()

    def _verify_term(self) -> None:
        """Values and gradients, which differ by rounding alone."""
        mine = [getattr(layer, factor).grad for layer in self._layers.values() for factor in FACTORS]
        theirs = [getattr(self._peft.model[name], factor)[_ADAPTER].grad for name in self._layers for factor in FACTORS]
        before = [gradient.clone() for gradient in mine]
        for gradient in (*mine, *theirs):
            gradient.zero_()
        value = self._ours.add_regularization_gradient()
        loss = self._peft().loss
        loss.backward()
        pairs = [(value, loss.detach()), *zip(mine, theirs, strict=True)]
        for own, other in pairs:
            if not torch.allclose(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max())):
                raise WrongResultError(
                    f"{self.case.id}: the orthogonality terms differ by {float((own - other).abs().max()):.3g}; "
                    "nothing was timed"
                )
        for gradient, start in zip((*mine, *theirs), (*before, *before), strict=True):
            gradient.copy_(start)
