"""Reading adapters from HF peft's adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftkernels.integrations.peft.adapter_save import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from peftkernels.nn import AdaLoRALinear, LoRALinear
from peftkernels.rank_plan import RankState

# What these settings change, the layers here do not do; each with the value that means "not used".
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


def load_adapter(model: nn.Module, directory: Path | str) -> None:
    """Read an adapter that peft or `save_adapter` wrote into `model`, in place.

    Where the file has an adapter, `model` has either a layer of the same kind, rank and scaling, which is filled, or
    a plain `nn.Linear`, which is replaced by a new layer. An AdaLoRA file holds only the ranks that were kept: they
    return to their places as ACTIVE, the others are zero and DEAD. Trained modules saved whole are copied over those
    of `model`. Raises FileNotFoundError for a missing file, ValueError or TypeError, before the model is changed, for
    a configuration that these layers do not compute, a module that is missing or of another kind, rank, scaling or
    shape, and for adapter layers of the model that the file does not have.
    """
    directory = Path(directory)
    config = _read_config(directory)
    weights_path = directory / WEIGHTS_NAME
    if not weights_path.is_file():
        raise FileNotFoundError(f"directory: found no {WEIGHTS_NAME} in {directory}, expected it beside {CONFIG_NAME}")
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(weights_path).items()}

    suffix = ".lora_A" if config["peft_type"] == "ADALORA" else ".lora_A.weight"
    paths = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    if not paths:
        raise ValueError(f"{weights_path}: found no tensor named ...{suffix}, expected the factors of an adapter")
    adapted = {path for path, module in model.named_modules() if isinstance(module, (LoRALinear, AdaLoRALinear))}
    if adapted - {*paths}:
        left = ", ".join(sorted(adapted - {*paths})[:6])
        raise ValueError(f"model: found adapter layers that the file does not have, {left}")

    adapters = {path: _read_adapter(path, config, tensors, weights_path) for path in paths}
    for path, adapter in adapters.items():
        _check_module(model, path, adapter)
    whole = _check_whole_modules(model, tensors, weights_path)

    layers = {path: _layer_for(model, path, adapter) for path, adapter in adapters.items()}
    with torch.no_grad():
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
            layer.load_state_dict(adapters[path].state, strict=False)
        for target, value in whole:
            target.copy_(value)


@dataclass(frozen=True)
class _ReadAdapter:
    """One layer's adapter as it stands in the file; `state` are the layer's own tensors by the layer's own names."""

    kind: type[LoRALinear] | type[AdaLoRALinear]
    r: int
    alpha: float
    dropout: float
    state: dict[str, Tensor]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"directory: found no {CONFIG_NAME} in {directory}, expected an adapter's directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: found no JSON ({error.msg})") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA"):
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: found peft_type {found!r}, expected 'LORA' or 'ADALORA'")
    for name, unused in _UNSUPPORTED.items():
        if config.get(name) not in (unused, None, False, [], {}):
            raise ValueError(f"{path}: found {name} = {config[name]!r}, expected {unused!r}, all these layers compute")
    return config


def _read_adapter(path: str, config: Mapping[str, Any], tensors: dict[str, Tensor], source: Path) -> _ReadAdapter:
    """Take the adapter of the layer at `path` out of `tensors`."""
    gated = config["peft_type"] == "ADALORA"
    state = {}
    for name in ("lora_A", "lora_B", "lora_E") if gated else ("lora_A.weight", "lora_B.weight"):
        if f"{path}.{name}" not in tensors:
            raise ValueError(f"{source}: found no {path}.{name}, expected it beside {path}.lora_A")
        state[name] = tensors.pop(f"{path}.{name}")
    dropout = config.get("lora_dropout") or 0.0
    if not gated:
        return _ReadAdapter(LoRALinear, state["lora_A.weight"].shape[0], _alpha(config, path), dropout, state)
    r = config["init_r"]
    return _ReadAdapter(AdaLoRALinear, r, config["lora_alpha"], dropout, _spread_ranks(path, r, config, state))


def _check_module(model: nn.Module, path: str, adapter: _ReadAdapter) -> None:
    """Whether the module of `model` at `path` can take the adapter."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"model: found no module {path!r}, for which the file has an adapter") from error
    expected = f"{adapter.kind.__name__} with r={adapter.r}, lora_alpha={adapter.alpha} as in the file"
    if isinstance(module, (LoRALinear, AdaLoRALinear)):
        if (type(module), module.r, module.lora_alpha) != (adapter.kind, adapter.r, adapter.alpha):
            raise ValueError(
                f"model: found {type(module).__name__} with r={module.r}, lora_alpha={module.lora_alpha} at {path!r}, "
                f"expected {expected}"
            )
    elif not isinstance(module, nn.Linear):
        raise TypeError(f"model: found {type(module).__name__} at {path!r}, expected nn.Linear or {expected}")
    shapes = {"lora_A": (adapter.r, module.in_features), "lora_B": (module.out_features, adapter.r)}
    for name, shape in shapes.items():
        found = tuple(adapter.state[name if name in adapter.state else f"{name}.weight"].shape)
        if found != shape:
            raise ValueError(f"{path}.{name}: found {found} in the file, expected {shape} for the model's layer")


def _layer_for(model: nn.Module, path: str, adapter: _ReadAdapter) -> LoRALinear | AdaLoRALinear:
    """The adapter layer of `model` at `path`, or a new one around the linear layer there."""
    module = model.get_submodule(path)
    if isinstance(module, (LoRALinear, AdaLoRALinear)):
        return module
    assert isinstance(module, nn.Linear)
    return adapter.kind.from_linear(module, adapter.r, adapter.alpha, adapter.dropout)


def _alpha(config: Mapping[str, Any], path: str) -> float:
    for key, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(alpha)
    return config["lora_alpha"]


def _spread_ranks(path: str, r: int, config: Mapping[str, Any], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors at the layer's full rank: kept ranks in their places, zeros elsewhere, and the states to that."""
    pattern = (config.get("rank_pattern") or {}).get(f"{path}.lora_E", [True] * r)
    found = [factors["lora_A"].shape[0], factors["lora_B"].shape[1], factors["lora_E"].shape[0]]
    if len(pattern) != r or found != [sum(pattern)] * 3:
        raise ValueError(
            f"rank_pattern[{path + '.lora_E'!r}]: found {len(pattern)} ranks, {sum(pattern)} of them kept, and "
            f"{found} ranks in lora_A, lora_B and lora_E, expected {r} ranks and as many kept as in the factors"
        )
    keep = torch.tensor(pattern, dtype=torch.bool)
    spread = {}
    for name, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
        value = factors[name]
        shape = list(value.shape)
        shape[dim] = r
        spread[name] = value.new_zeros(shape).index_copy_(dim, keep.nonzero().squeeze(1), value)
    spread["rank_state"] = torch.where(keep, int(RankState.ACTIVE), int(RankState.DEAD)).to(torch.uint8)
    return spread


def _check_whole_modules(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> list[tuple[Tensor, Tensor]]:
    own = model.state_dict(keep_vars=True)
    pairs = []
    for name, value in tensors.items():
        if name not in own:
            raise ValueError(f"{source}: found the tensor {name!r}, which the model does not have")
        if own[name].shape != value.shape:
            raise ValueError(f"{name}: found {tuple(value.shape)} in the file, expected {tuple(own[name].shape)}")
        pairs.append((own[name], value))
    return pairs
