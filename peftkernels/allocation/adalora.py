"""AdaLoRA's rank allocation, step for step as HF peft does it, with a state that survives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peftkernels.allocation.explain import explain_decision
from peftkernels.allocation.hook import IdleWatch, run_after_step
from peftkernels.allocation.kernels import kernels_for
from peftkernels.allocation.orthogonality import orthogonality
from peftkernels.allocation.plans import update_plans, zero_gates
from peftkernels.allocation.protocol import FACTORS, GatedLayer, find_gated_layers
from peftkernels.allocation.report import AllocationReport
from peftkernels.allocation.scores import ScoreAverages
from peftkernels.allocation.selection import Decision, select_ranks
from peftkernels.allocation.settings import AdaLoraSettings
from peftkernels.rank_plan import RankPlan, RankState

_STATE_FORMAT = 1


@dataclass(frozen=True)
class AdaLoraSnapshot:
    """A moment of an allocator and the adapters it decides on: `AdaLoraAllocator.snapshot`."""

    state: dict[str, Any]
    factors: tuple[Tensor, ...]


class AdaLoraAllocator:
    """Adaptive rank budgets by AdaLoRA (Zhang et al., arXiv 2303.10512), by the rule of HF peft's RankAllocator.

    The budget of ranks over all layers falls from the sum of their ranks, b0, to target_r times their number, along a
    cubic between step `tinit` and step `total_step - tfinal`; the ranks with the lowest scores are masked by setting
    their gate lora_E to zero, and can come back while the budget still falls. `ScoreAverages` has the formula of the
    scores, `CubicSchedule` that of the budget, `select_ranks` that of the threshold.

        allocator = AdaLoraAllocator(model, total_step=1000, target_r=8, tinit=100, tfinal=300)
        allocator.attach(optimizer)
        for batch in batches:
            (loss(model, batch) + allocator.regularization()).backward()
            optimizer.step()
            optimizer.zero_grad()

    Arguments:
        model            a module with AdaLoRALinear layers, or a mapping of names to such layers, all on one device
        total_step       optimizer steps of the whole run
        target_r         average rank per layer at the end, below every layer's initial rank
        tinit            steps before the first mask
        tfinal           steps at the end in which the ranks stay as they are
        deltaT           steps between two masks
        beta1, beta2     smoothing of sensitivity and uncertainty, between 0 and 1
        orth_reg_weight  weight w of the orthogonality term
        exact_budget     False: ranks that tie with the threshold are all masked, as in peft. True: exactly the budget
                         stays; of ranks that tie, those of earlier layers and lower index stay
        compact          True: after step total_step - tfinal masked ranks are DEAD instead of PROBE. They then cost
                         nothing, and the run departs from peft's: their gates get no gradient, so the norm that
                         gradient clipping sees is smaller, and the orthogonality term covers the kept ranks only

    States of the ranks: all ACTIVE from the moment the allocator is made; after a mask, masked ranks are PROBE until
    the next optimizer step, which moves their gates away from zero; between masks (deltaT > 1) every rank is ACTIVE.

    A step whose p·g is not finite somewhere leaves the averages unchanged, is counted and warned about once; on an
    accelerator the count is read back, and the warning given, only at the last allocation and when the state is saved
    or explained. A factor without a gradient counts as one with gradient zero and is warned about once; if no factor
    has one, `step` raises RuntimeError. Raises TypeError or ValueError naming the argument found wrong.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        total_step: int,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        exact_budget: bool = False,
        compact: bool = False,
    ) -> None:
        self.settings = AdaLoraSettings(
            total_step, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, exact_budget, compact
        )
        self._layers = find_gated_layers(model)
        self._ranks = {name: layer.lora_E.shape[0] for name, layer in self._layers.items()}
        self._schedule = self.settings.schedule(self._ranks)
        device = _common_device(self._layers)
        self._averages: ScoreAverages | None = ScoreAverages(self._layers, beta1, beta2)
        self._keep = torch.ones(self._schedule.initial_budget, dtype=torch.bool, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._decision: Decision | None = None
        self._step = 0
        # Layers may come with states of an earlier run.
        self._write_all_active()
        self._handle: RemovableHandle | None = None
        self._watch = IdleWatch(self._layers)
        self._warned: set[str] = set()

    def attach(self, optimizer: Optimizer) -> None:
        """Run after every `optimizer.step()` from now on, until `detach`.

        Raises RuntimeError when attached already, TypeError for anything but an optimizer, and ValueError, naming
        them, where lora_A, lora_B or lora_E of a layer are not among the optimizer's parameters.
        """
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer already; call detach() first")
        self._handle = run_after_step(optimizer, self._advance, self._layers)

    def detach(self) -> None:
        """Undo `attach`; does nothing when not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def regularization(self) -> Tensor:
        """The orthogonality term w/(2n)·Σ(‖A·Aᵀ-I‖_F + ‖Bᵀ·B-I‖_F) over the n layers, 0-dim, to be added to the loss.

        Masked ranks are included, as in peft, except DEAD ones (`compact=True` after the last allocation).
        `add_regularization_gradient` does the same for less.
        """
        self._warn_if_idle()
        layers = list(self._layers.values())
        if self.settings.orth_reg_weight == 0:
            return torch.zeros((), device=layers[0].lora_A.device)
        lora_A, lora_B = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
        return orthogonality(lora_A, lora_B, self.settings.orth_reg_weight, self._alive(lora_A[0].device))

    @torch.no_grad()
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
        layers = list(self._layers.values())
        weight = self.settings.orth_reg_weight
        lora_A, lora_B = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
        device = lora_A[0].device
        if weight == 0:
            return torch.zeros((), device=device)
        targets = []
        for factor in (*lora_A, *lora_B):
            if factor.requires_grad and factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            # What is added to a factor that is not trained goes nowhere.
            own = factor.grad if factor.requires_grad else None
            targets.append(torch.zeros_like(factor) if own is None else own)
        kernels = kernels_for(device, lora_A[0].dtype)
        return kernels.orthogonality(lora_A, lora_B, weight, self._alive(device), targets, scale)[0]

    def _alive(self, device: torch.device) -> tuple[Tensor, ...] | None:
        """The ranks that the orthogonality term covers, layer by layer; None for all of them."""
        if self.settings.compact and self._averages is None:
            return self._keep.to(device).split(list(self._ranks.values()))
        return None

    def step(self, step: int | None = None) -> None:
        """Advance to optimizer step `step` (the next one when None), for loops without an optimizer hook.

        Call it after `optimizer.step()` and before the gradients are cleared. Raises RuntimeError when attached,
        since the hook calls it then, and ValueError for a step that is not after the last one; steps count from 1.
        """
        if self._handle is not None:
            raise RuntimeError("the allocator is attached to an optimizer, whose hook steps it; call detach() first")
        self._advance(step)

    def budget(self, step: int) -> int:
        """How many ranks, over all layers, the schedule allows after optimizer step `step`."""
        return self._schedule(step)[0]

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For every layer by name, which ranks the last mask kept; all of them before the first mask."""
        self._warn_if_idle()
        parts = self._keep.cpu().split(list(self._ranks.values()))
        return {name: part.tolist() for name, part in zip(self._ranks, parts, strict=True)}

    def explain(self) -> AllocationReport:
        """The last decision, layer by layer: ranks kept, scores, margin to the threshold, and why."""
        self._warn_if_idle()
        return explain_decision(
            self.settings, self._schedule, self._step, self._decision, self.rank_pattern(), self.nonfinite_steps
        )

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had gradients that were not finite and left the scores unchanged; reads the device."""
        count = int(self._nonfinite)
        if count:
            self._warn_once(
                "nonfinite",
                "a step had gradients that are not finite; it leaves the allocator's score averages unchanged "
                "(later ones are counted in nonfinite_steps without a warning)",
            )
        return count

    def state_dict(self) -> dict[str, Any]:
        """The allocator's whole state, as copies: tensors, numbers, strings and dictionaries of them.

        With the model's and the optimizer's state_dict it continues a run, at any step, to the same bits.
        """
        self._warn_if_idle()
        return {
            "format": _STATE_FORMAT,
            "settings": asdict(self.settings),
            "ranks": dict(self._ranks),
            "step": self._step,
            "nonfinite_steps": self.nonfinite_steps,
            "keep": self._keep.clone(),
            "all_active": self._plans_all_active,
            "averages": None if self._averages is None else self._averages.state_dict(),
            "decision": None if self._decision is None else asdict(self._decision),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, and write the rank states that belong to it into the layers' plans.

        Raises ValueError, before any change, where the state was saved with other settings or for other layers,
        naming each difference.
        """
        self._check_state(state)
        averages = state["averages"]
        if averages is None:
            self._averages = None
        else:
            restored = ScoreAverages(self._layers, self.settings.beta1, self.settings.beta2)
            restored.load_state_dict(averages)
            self._averages = restored
        device = _common_device(self._layers)
        self._step = state["step"]
        self._nonfinite = torch.tensor(state["nonfinite_steps"], dtype=torch.int64, device=device)
        self._keep = state["keep"].to(device, copy=True)
        decision = state["decision"]
        self._decision = None if decision is None else Decision(**decision).to(device)
        if state["all_active"]:
            self._write_all_active()
        else:
            self._write_masked_states()
        self._watch.reset()

    def snapshot(self) -> AdaLoraSnapshot:
        """A token of the present moment for `rollback`: the allocator's state and the values of A, B and E.

        The optimizer is not part of it: whoever wants its moments back as well keeps a copy of its state_dict.
        """
        return AdaLoraSnapshot(self.state_dict(), tuple(factor.detach().clone() for factor in self._factors()))

    @torch.no_grad()
    def rollback(self, token: AdaLoraSnapshot) -> None:
        """Return to the moment of the snapshot: allocator, factors and rank states, in place; a token can be reused.

        Raises TypeError for anything but a token of `snapshot`, ValueError for another allocator's.
        """
        if not isinstance(token, AdaLoraSnapshot):
            raise TypeError(f"token: found {type(token).__name__}, expected what snapshot() returned")
        self._check_state(token.state)
        torch._foreach_copy_(self._factors(), list(token.factors))
        self.load_state_dict(token.state)

    def _factors(self) -> list[Tensor]:
        return [getattr(layer, factor) for layer in self._layers.values() for factor in FACTORS]

    def _gates(self) -> list[Tensor]:
        return [layer.lora_E for layer in self._layers.values()]

    def _advance(self, step: int | None = None) -> None:
        if step is None:
            step = self._step + 1
        elif not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"step: found {step!r} ({type(step).__name__}), expected an int or None")
        elif step <= self._step:
            raise ValueError(f"step: found {step}, expected more than the last step, {self._step}; steps count from 1")
        self._follow_device()
        last = self.settings.last_allocation
        if step < last:
            self._update_scores()
            budget, due = self._schedule(step)
            if due:
                self._decide(step, budget)
                self._write_masked_states()
            elif not self._plans_all_active:
                self._write_all_active()
        elif self._averages is not None:
            if self._step == 0:
                raise ValueError(f"step: found {step} as the first, expected less than {last}: there are no scores yet")
            self._decide(step, self._schedule.final_budget)
            self._averages = None
            self._write_masked_states()
            _ = self.nonfinite_steps
        else:
            zero_gates(self._gates(), self._keep)
        self._step = step
        self._watch.reset()

    def _update_scores(self) -> None:
        assert self._averages is not None
        update = self._averages.update()
        if update.missing:
            shown = ", ".join(update.missing[:6]) + (" and others" if len(update.missing) > 6 else "")
            self._warn_once("missing", f"no gradient on {shown}: the scores count a missing gradient as zero")
        self._nonfinite += ~update.finite
        if self._nonfinite.device.type == "cpu":
            _ = self.nonfinite_steps

    def _decide(self, step: int, budget: int) -> None:
        assert self._averages is not None
        scores = self._averages.rank_scores()
        self._keep, threshold = select_ranks(scores, budget, exact=self.settings.exact_budget)
        self._decision = Decision(step, budget, scores, threshold)
        zero_gates(self._gates(), self._keep)

    def _write_masked_states(self) -> None:
        final = self._averages is None
        masked = RankState.DEAD if final and self.settings.compact else RankState.PROBE
        states = torch.full(self._keep.shape, int(masked), dtype=torch.uint8, device=self._keep.device)
        update_plans(self._plans(), states.masked_fill_(self._keep, int(RankState.ACTIVE)))
        self._plans_all_active = False

    def _write_all_active(self) -> None:
        states = torch.full(self._keep.shape, int(RankState.ACTIVE), dtype=torch.uint8, device=self._keep.device)
        update_plans(self._plans(), states)
        self._plans_all_active = True

    def _plans(self) -> list[RankPlan]:
        return [layer.rank_plan for layer in self._layers.values()]

    def _follow_device(self) -> None:
        """The layers may have been moved since the last step."""
        device = _common_device(self._layers)
        if self._keep.device == device:
            return
        self._keep = self._keep.to(device)
        self._nonfinite = self._nonfinite.to(device)
        if self._averages is not None:
            self._averages.to_(device)
        if self._decision is not None:
            self._decision = self._decision.to(device)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        if found != _STATE_FORMAT:
            raise ValueError(f"state: found format {found!r}, expected {_STATE_FORMAT} as given by state_dict()")
        expected = asdict(self.settings)
        differences = [
            f"{name} (found {state['settings'].get(name)!r}, expected {value!r})"
            for name, value in expected.items()
            if state["settings"].get(name) != value
        ]
        if differences:
            raise ValueError(f"state: it was saved by an allocator with other settings: {', '.join(differences)}")
        if state["ranks"] != self._ranks:
            different = sorted(set(state["ranks"].items()) ^ set(self._ranks.items()))
            shown = ", ".join(map(str, different[:6]))
            raise ValueError(f"state: it was saved for other layers; (layer, rank) on one side only: {shown}")

    def _warn_if_idle(self) -> None:
        if not self._watch.idle():
            return
        if self._handle is None:
            self._warn_once(
                "idle",
                "the gates lora_E are being trained but the allocator is not stepped, so no rank is ever masked: call "
                "attach(optimizer) once, or step() after every optimizer step",
            )
        else:
            self._warn_once(
                "idle",
                "the gates lora_E are being trained but the optimizer the allocator is attached to is not stepped: "
                "call detach() and attach the one that is",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=3)


def _common_device(layers: Mapping[str, GatedLayer]) -> torch.device:
    devices = {layer.lora_E.device: name for name, layer in layers.items()}
    if len(devices) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"layers: found {found}, expected all of them on one device")
    return next(iter(devices))
