"""What an allocator needs of the layers whose ranks it decides, and how it finds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from peftkernels._module_names import named_modules
from peftkernels.ops.rank_plan import RankPlan

FACTORS = ("lora_A", "lora_B", "lora_E")


@runtime_checkable
class GatedLayer(Protocol):
    """A layer with an adapter whose ranks can be masked.

    Attributes:
        lora_A: Parameter (r, K).
        lora_B: Parameter (N, r).
        lora_E: Parameter (r, 1), the gate of each rank.
        rank_plan: The states of the ranks, over the layer's own tensors: writes such as `rank_plan.update_` reach it.
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
    """Return these factors of every layer, layer by layer, as they are now.

    It gives what getattr does; but a module's own looks into one dictionary after the other, which takes several times
    as long.
    """
    found = []
    for layer in layers:
        parameters = getattr(layer, "_parameters", {})
        for name in names:
            factor = parameters.get(name)
            found.append(getattr(layer, name) if factor is None else factor)
    return found


def find_gated_layers(source: nn.Module | Mapping[str, Any]) -> dict[str, GatedLayer]:
    """Return the gated layers of a model by module path, or the given layers by the given names, checked.

    Raises:
        TypeError: For anything but a module or a mapping of names to gated layers.
        ValueError: Where there is no gated layer, where one is given twice or where its factors disagree in rank.
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
