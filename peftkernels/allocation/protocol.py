"""What an allocator offers to a training loop, and what it needs of the layers whose ranks it decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from peftkernels._module_names import named_modules
from peftkernels.allocation.observer import Observer
from peftkernels.allocation.report import AllocationReport
from peftkernels.ops.rank_plan import RankPlan

FACTORS = ("lora_A", "lora_B", "lora_E")


@runtime_checkable
class GatedLayer(Protocol):
    """A layer with an adapter whose ranks can be masked.

    lora_A    (r, K)   parameter
    lora_B    (N, r)   parameter
    lora_E    (r, 1)   parameter, the gate of each rank
    rank_plan          the states of the ranks; `rank_plan.update_` style writes must reach the layer's own tensors
    """

    @property
    def lora_A(self) -> Tensor: ...

    @property
    def lora_B(self) -> Tensor: ...

    @property
    def lora_E(self) -> Tensor: ...

    @property
    def rank_plan(self) -> RankPlan: ...


def factors_of(layers: Iterable[GatedLayer], *names: str) -> list[Tensor]:
    """These factors of every layer, layer by layer, as they are now.

    What getattr gives; but a module's own looks into one dictionary after the other, which takes several times as long.
    """
    found = []
    for layer in layers:
        parameters = getattr(layer, "_parameters", {})
        for name in names:
            factor = parameters.get(name)
            found.append(getattr(layer, name) if factor is None else factor)
    return found


class Allocator(Protocol):
    """Turns statistics of a running fine-tuning into rank plans under a budget.

    A training loop attaches the allocator to its optimizer (or calls `step` after every optimizer step, before the
    gradients are cleared) and adds `regularization()` to its loss. Where a strategy or a policy learns from the loss,
    it also calls `observe`. Nothing else is asked of it.
    """

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        ...

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer the allocator is attached to."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers given to `freeze`."""
        ...

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose gradients were not finite and left the statistics as they were."""
        ...

    @property
    def undecided_steps(self) -> int:
        """Steps that were to choose ranks and had no score to choose by."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Calls of the optimizer that a GradScaler kept from stepping."""
        ...

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back."""
        ...

    def attach(self, optimizer: Optimizer) -> None:
        """Run after every `optimizer.step()` from now on."""
        ...

    def detach(self) -> None:
        """Undo `attach`."""
        ...

    def close(self) -> None:
        """Undo `attach`, and leave the layers to another allocator."""
        ...

    def observe(self, loss: Tensor | float) -> None:
        """The loss of the step that is being made, before `optimizer.step()`."""
        ...

    def regularization(self) -> Tensor:
        """A 0-dim term to add to the loss; zero where the strategy has none."""
        ...

    def add_regularization_gradient(self, scale: float = 1.0) -> Tensor:
        """What adding `regularization()` to the loss does, after backward() and without a graph; returns the term."""
        ...

    def step(self, step: int | None = None) -> None:
        """Advance by one optimizer step, for loops without an optimizer hook."""
        ...

    def budget(self, step: int) -> float:
        """What may be alive, over all layers, after optimizer step `step`, in the budget's unit."""
        ...

    def rank_pattern(self) -> dict[str, list[bool]]:
        """For every layer by name, which ranks the last decision kept."""
        ...

    def freeze(self, name: str, *, drop: bool = True) -> None:
        """Take a layer out of the fine-tuning, with its ranks (drop=False) or without them."""
        ...

    def add_observer(self, observer: Observer) -> None:
        """Tell `observer` from now on what is decided."""
        ...

    def add_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` with this allocator after every step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later as if nothing had happened, together with the model's and optimizer's:
        tensors by name, which safetensors can write."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; refuses what another allocator gave before any change."""
        ...

    def snapshot(self) -> Any:
        """A token that `rollback` returns to."""
        ...

    def rollback(self, token: Any, why: str = "asked for") -> None:
        """Return to the moment of the snapshot: allocator, parameters and optimizer's moments."""
        ...

    def explain(self) -> AllocationReport:
        """The last decision, layer by layer, with the reason."""
        ...


def find_gated_layers(source: nn.Module | Mapping[str, Any]) -> dict[str, GatedLayer]:
    """The gated layers of a model by module path, or the given layers by the given names, checked.

    Raises TypeError for anything but a module or a mapping of names to gated layers, and ValueError where there is no
    gated layer, where one is given twice or where its factors disagree in rank.
    """
    if isinstance(source, nn.Module):
        layers: dict[str, Any] = {name: module for name, module in named_modules(source) if _is_gated(module)}
        if not layers:
            raise ValueError(
                f"model: found no AdaLoRALinear layer in {type(source).__name__}, expected at least one; "
                "build them with peftkernels.nn.AdaLoRALinear.from_linear"
            )
    elif isinstance(source, Mapping):
        layers = dict(source)
        if not layers:
            raise ValueError("layers: found an empty mapping, expected at least one AdaLoRALinear layer")
    else:
        raise TypeError(
            f"model: found {type(source).__name__}, expected a torch.nn.Module or a mapping of names to layers"
        )

    seen: dict[int, str] = {}
    for name, layer in layers.items():
        if not isinstance(name, str):
            raise TypeError(f"layers: found the name {name!r}, expected a str")
        if not _is_gated(layer):
            raise TypeError(f"layers[{name!r}]: found {type(layer).__name__}, expected an AdaLoRALinear layer")
        if id(layer) in seen:
            raise ValueError(f"layers[{name!r}]: found the layer given as {seen[id(layer)]!r} too, expected it once")
        seen[id(layer)] = name
        r = layer.lora_E.shape[0]
        if layer.lora_A.shape[0] != r or layer.lora_B.shape[1] != r:
            raise ValueError(
                f"layers[{name!r}]: found lora_A {tuple(layer.lora_A.shape)}, lora_B {tuple(layer.lora_B.shape)} and "
                f"lora_E {tuple(layer.lora_E.shape)}, expected (r, K), (N, r) and (r, 1)"
            )
    return layers


def _is_gated(module: Any) -> bool:
    has_factors = all(isinstance(getattr(module, name, None), Tensor) for name in FACTORS)
    return has_factors and isinstance(getattr(module, "rank_plan", None), RankPlan)
