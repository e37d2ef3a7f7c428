"""Allocating the ranks of HF peft's AdaLoRA while a Trainer trains it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels._reading import check_flag, check_list, check_object, shown
from peftkernels.allocation.run.state_checks import check_floats, check_names, part
from peftkernels.integrations.transformers.checkpoint_state import first_difference

_FACTORS = ("lora_A", "lora_B", "lora_E")
_PARAMETERS = "parameters."
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
_SETTINGS = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")


class PeftTraining:
    """The AdaLoRA adapter of a peft model during one training.

    Between steps the configuration's `rank_pattern` is kept here and is None there. peft cuts an adapter to its
    rank_pattern when it is saved, and loads such a file only into an adapter cut in the same way; without it,
    checkpoints hold every rank, masked ones with gate zero, and load into the model that is being trained.

    Raises:
        ImportError: peft is not installed.
        ValueError: `model` has no AdaLoRA adapter to train, or several.
    """

    kind = "peft"

    def __init__(self, model: nn.Module) -> None:
        self.tuner = find_adalora(model)
        self.adapter: str = self.tuner.trainable_adapter_name
        self.config = self.tuner.peft_config[self.adapter]
        self.allocator = self.tuner.rankallocator
        self.pattern: dict[str, list[bool]] | None = None
        self._finalised = False
        self._judged: list[Tensor] = []

    @property
    def factors(self) -> dict[str, Tensor]:
        """lora_A (r, K), lora_B (N, r) and lora_E (r, 1) of the trained adapter by name."""
        endings = tuple(f".{factor}.{self.adapter}" for factor in _FACTORS)
        return {name: value for name, value in self.tuner.model.named_parameters() if name.endswith(endings)}

    @property
    def last_allocation(self) -> int:
        """The step after which ranks no longer change."""
        last: int = self.config.total_step - self.config.tfinal
        return last

    @property
    def finished(self) -> bool:
        """True once the last allocation is done."""
        return self._finalised

    def begin(self, optimizer: Any, max_steps: int, total_step: int | None, placeholder: int) -> None:
        """Settle the schedule and begin with no averages and no pattern, before the first step.

        Args:
            optimizer: not used: peft's allocator is called after its steps.
            max_steps: optimizer steps of the Trainer.
            total_step: optimizer steps that the schedule is laid out for; None takes `max_steps`.
            placeholder: the configuration's total_step that stands for `max_steps`.
        """
        found = self.config.total_step
        settled = max_steps if total_step is None else total_step
        if total_step is None and found not in (None, placeholder, max_steps):
            warnings.warn(
                f"total_step: found {found} in the AdaLoraConfig and {max_steps} optimizer steps in the Trainer: using "
                f"{max_steps}; AdaLoraCallback(total_step={found}) keeps {found}",
                UserWarning,
                stacklevel=2,
            )
        self._check(settled)
        self.config.total_step = settled
        self.allocator.set_total_step(settled)
        if self.last_allocation > max_steps:
            warnings.warn(
                f"total_step: found {settled} with tfinal={self.config.tfinal}, but the Trainer makes {max_steps} "
                f"optimizer steps: the last allocation, at step {self.last_allocation}, is not reached",
                UserWarning,
                stacklevel=2,
            )
        self.allocator.reset_ipt()
        self.config.rank_pattern = None
        self.pattern, self._finalised = None, False
        self._judged = list(self.factors.values())

    def before_step(self) -> None:
        """The orthogonality term is in the loss already: peft's forward adds it."""

    def after_step(self, step: int, skipped: bool) -> None:
        """Take in optimizer step `step`, counted from 1, while its gradients are there; nothing where it was skipped.

        Where the step of the last allocation was skipped, the next one makes up for it.
        """
        if skipped:
            return
        if step < self.last_allocation and all(factor.grad is None for factor in self._judged):
            raise RuntimeError(
                "the optimizer step left no gradient on any lora_A, lora_B or lora_E, expected those it used: another "
                "callback or the optimizer clears them before AdaLoraCallback reads them"
            )
        self._allocate(step if self._finalised else min(step, self.last_allocation))

    def end(self, step: int) -> None:
        """Training is over after optimizer step `step`: give the configuration its rank_pattern back."""
        if step >= self.last_allocation and not self._finalised and self.allocator.exp_avg_ipt:
            self._allocate(self.last_allocation)
        if step < self.last_allocation:
            kept, ranks = self._count()
            target = self.config.target_r * len(self.allocator.name_set)
            warnings.warn(
                f"training leaves the adapter as it was after step {step}, before the last allocation at step "
                f"{self.last_allocation}: {kept} of {ranks} ranks are kept, not the {target} of "
                f"target_r={self.config.target_r}",
                UserWarning,
                stacklevel=2,
            )
        self.config.rank_pattern = self._lossless_pattern()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of peft's lacks: tensors by name, and facts that JSON can hold."""
        tensors = {_PARAMETERS + name: value for name, value in self._parameters().items()}
        for average in _AVERAGES:
            tensors |= {f"{average}.{name}": value for name, value in getattr(self.allocator, average).items()}
        facts = {
            "adapter": self.adapter,
            "finalised": self._finalised,
            "rank_pattern": self.pattern,
            "settings": {name: getattr(self.config, name) for name in _SETTINGS},
        }
        return tensors, facts

    def difference(self, tensors: Mapping[str, Tensor]) -> str | None:
        """How the packed adapter differs from the model's, in words; None where they are equal.

        `ranknum` does not count: peft does not save it.
        """
        ours, packed = self._parameters(), part(tensors, _PARAMETERS)
        return first_difference(
            {name: value for name, value in packed.items() if ".ranknum." not in name},
            {name: value for name, value in ours.items() if ".ranknum." not in name},
        )

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `pack` gave, after `begin`.

        Raises:
            ValueError: before any change, for anything else and where the schedule cannot go on from there.
        """
        self._check_state(tensors, facts)
        changed = [
            f"{name} (found {facts['settings'][name]}, now {getattr(self.config, name)})"
            for name in _SETTINGS
            if facts["settings"][name] != getattr(self.config, name)
        ]
        if facts["finalised"] and facts["step"] < self.last_allocation:
            raise ValueError(
                f"total_step: the checkpoint of step {facts['step']} was made after its last allocation; expected a "
                f"schedule whose last allocation is not after it, found step {self.last_allocation}: "
                f"{', '.join(changed)}"
            )
        if changed:
            message = "the checkpoint was made with other settings, the schedule goes on with the new ones: "
            warnings.warn(message + ", ".join(changed), UserWarning, stacklevel=3)
        self._restore_parameters(tensors)
        own = self.factors
        averages = {
            average: {name: value.to(own[name].device) for name, value in part(tensors, f"{average}.").items()}
            for average in _AVERAGES
        }
        for average, values in averages.items():
            setattr(self.allocator, average, values)
        # peft starts the averages of a parameter anew where it has no sensitivity of the step before.
        self.allocator.ipt = {name: torch.zeros_like(value) for name, value in averages[_AVERAGES[0]].items()}
        self.pattern = facts["rank_pattern"]
        self._finalised = facts["finalised"]

    def adopt(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The parameters of another checkpoint were loaded into the model: take its pattern over.

        Raises:
            ValueError: before any change, for anything but what `pack` gave.
        """
        self._check_state(tensors, facts)
        self._restore_parameters(tensors)
        self.pattern = facts["rank_pattern"]

    def _check_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        parameters, factors = self._parameters(), self.factors
        saved = part(tensors, _PARAMETERS)
        # peft does not save `ranknum`: a state may do without it.
        expected = [name for name in parameters if name in saved or ".ranknum." not in name]
        check_names(saved, expected, "state: parameters")
        for name in saved:
            check_floats(tensors, _PARAMETERS + name, parameters[name].shape)
        judged = {average: part(tensors, f"{average}.") for average in _AVERAGES}
        if any(judged.values()):
            for average, values in judged.items():
                check_names(values, factors, f"state: {average}")
                for name in values:
                    check_floats(tensors, f"{average}.{name}", factors[name].shape)
        settings = check_object(facts.get("settings"), "state: settings")
        check_names({name: settings[name] for name in _SETTINGS if name in settings}, _SETTINGS, "state: settings")
        check_flag(facts.get("finalised"), "state: finalised")
        if "rank_pattern" not in facts:
            raise ValueError("state: rank_pattern: found nothing, expected what is kept of every gate, or null")
        if facts["rank_pattern"] is not None:
            self._check_pattern(check_object(facts["rank_pattern"], "state: rank_pattern"))

    def _check_pattern(self, pattern: Mapping[str, Any]) -> None:
        # peft leaves the adapter's name out of some of its patterns.
        short = not any(self.adapter in name for name in pattern)
        gates = {
            name.replace(f".{self.adapter}", "") if short else name: gate.shape[0]
            for name, gate in self._gates().items()
        }
        check_names(pattern, gates, "state: rank_pattern")
        for name, r in gates.items():
            where = f"state: rank_pattern: {name}"
            kept = check_list(pattern[name], where)
            if len(kept) != r or not all(isinstance(one, bool) for one in kept):
                raise ValueError(f"{where}: found {shown(kept)}, expected true or false for each of {r} ranks")

    def _allocate(self, step: int) -> None:
        self.config.rank_pattern = self.pattern
        try:
            self.tuner.update_and_allocate(step)
        finally:
            self.pattern, self.config.rank_pattern = self.config.rank_pattern, None
        self._finalised = self._finalised or step == self.last_allocation

    def _parameters(self) -> dict[str, Tensor]:
        names = tuple(f".{name}.{self.adapter}" for name in (*_FACTORS, "ranknum"))
        return {name: value for name, value in self.tuner.model.named_parameters() if name.endswith(names)}

    @torch.no_grad()
    def _restore_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        own = self._parameters()
        for name, value in part(tensors, _PARAMETERS).items():
            own[name].copy_(value)

    def _gates(self) -> dict[str, Tensor]:
        ending = f".lora_E.{self.adapter}"
        return {name: value for name, value in self.factors.items() if name.endswith(ending)}

    def _count(self) -> tuple[int, int]:
        gates = self._gates()
        ranks = sum(gate.shape[0] for gate in gates.values())
        return (ranks if self.pattern is None else sum(map(sum, self.pattern.values()))), ranks

    def _lossless_pattern(self) -> dict[str, list[bool]] | None:
        """The pattern, with the masked ranks that have been trained since: peft would drop them from the file.

        There are none after the last allocation, nor with deltaT=1: masked gates are zero then.
        """
        if self.pattern is None:
            return None
        # peft shortens the names in the pattern once it has saved an adapter.
        short = all(not name.endswith(f".{self.adapter}") for name in self.pattern)
        kept = {name.removesuffix(f".{self.adapter}") if short else name: gate for name, gate in self._gates().items()}
        merged = {
            name: [keep or alive for keep, alive in zip(self.pattern[name], gate.view(-1).ne(0).tolist(), strict=True)]
            for name, gate in kept.items()
        }
        revived = sum(map(sum, merged.values())) - sum(map(sum, self.pattern.values()))
        if revived:
            warnings.warn(
                f"{revived} ranks that the last allocation masked have been trained since (deltaT="
                f"{self.config.deltaT}); rank_pattern keeps them, so that saving the adapter does not change it",
                UserWarning,
                stacklevel=3,
            )
        return merged

    def _check(self, total_step: int) -> None:
        """Raise ValueError, naming the argument, where a schedule of this length cannot work."""
        config = self.config
        limits = {"tinit": 0, "tfinal": 0, "deltaT": 1, "target_r": 1}
        for name, lowest in limits.items():
            if getattr(config, name) < lowest:
                raise ValueError(f"{name}: found {getattr(config, name)}, expected at least {lowest}")
        if config.target_r >= config.init_r:
            raise ValueError(f"target_r: found {config.target_r}, expected less than init_r={config.init_r}")
        last = total_step - config.tfinal
        if last < 2:
            raise ValueError(
                f"tfinal: found {config.tfinal} with total_step={total_step}, expected at most total_step - 2: ranks "
                "are chosen by the scores of the steps before step total_step - tfinal"
            )
        if config.tinit >= last:
            raise ValueError(
                f"tinit: found {config.tinit}, expected less than total_step - tfinal = {total_step} - "
                f"{config.tfinal} = {last}, so that there is a phase in which the budget decreases"
            )
        ranks = sum(gate.shape[0] for gate in self._gates().values())
        if ranks != self.allocator.init_bgt:
            raise ValueError(
                f"model: found an adapter with {ranks} of its {self.allocator.init_bgt} ranks, expected all of them: "
                "one that was saved after pruning cannot be pruned again, its schedule starts from init_r"
            )


def find_adalora(model: nn.Module) -> Any:
    """peft's AdaLoraModel inside `model`, whatever wraps it, with an adapter that is being trained.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is none, or several.
    """
    try:
        from peft.tuners.adalora import AdaLoraModel
    except ImportError as error:
        raise ImportError("AdaLoraCallback without allocator= needs peft: pip install 'peftkernels[hf]'") from error
    found = [module for module in model.modules() if isinstance(module, AdaLoraModel)]
    if not found:
        raise ValueError(
            f"model: found no AdaLoRA adapter in {type(model).__name__}, expected peft.get_peft_model(model, "
            "AdaLoraConfig(...)), or layers of peftkernels.nn with AdaLoraCallback(allocator=...)"
        )
    trained = [tuner for tuner in found if hasattr(tuner, "rankallocator")]
    if len(trained) != 1:
        raise ValueError(
            f"model: found {len(trained)} AdaLoRA models with an adapter to train among {len(found)}, expected one; an "
            "adapter is loaded for training by from_pretrained(..., is_trainable=True)"
        )
    tuner = trained[0]
    name = tuner.trainable_adapter_name
    gates = [value for key, value in tuner.model.named_parameters() if key.endswith(f".lora_E.{name}")]
    if name not in tuner.active_adapters or not all(gate.requires_grad for gate in gates):
        raise ValueError(
            f"model: found the adapters {list(tuner.active_adapters)} active, expected {name!r} to be active and "
            "trained, whose ranks peft allocates"
        )
    return tuner
