"""Writing adapters as HF peft's adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels._module_names import named_modules, named_places, named_tensors, unwrapped
from peftkernels.allocation.run.settings import AdaLoraSettings, AllocatorSettings
from peftkernels.integrations.peft.adapter_files import write_adapter_files
from peftkernels.nn import AdaLoRALinear, LoRALinear
from peftkernels.ops.rank_plan import RankState

PREFIX = "base_model.model."


@dataclass(frozen=True)
class _PlainAdapter:
    """One layer's adapter as plain LoRA: A (r, K), B (N, r), scaled by alpha/r."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]


def save_adapter(
    model: nn.Module,
    directory: Path | str,
    *,
    base_model_name_or_path: str = "",
    task_type: str | None = None,
    rank_pattern: Mapping[str, Sequence[bool]] | None = None,
    modules_to_save: Sequence[str] = (),
    as_lora: bool = False,
    settings: AllocatorSettings | None = None,
) -> None:
    """Write the adapters of `model` to `directory`, for `peft.PeftModel.from_pretrained(base_model, directory)`.

    Merged layers are written like unmerged ones. Names are those of the model without torch.compile, DDP, FSDP and
    activation checkpointing around it or its parts. Both files are written beside their targets first and renamed when
    complete. An interrupted call leaves the adapter that was there before or the new one, never a part of each:
    `load_adapter` reads it; peft does too or, for the moment between the renames, finds no adapter_config.json.

    Args:
        model: has LoRALinear or AdaLoRALinear layers where the base model has linear ones.
        directory: the folder for both files; it is made where it is missing.
        base_model_name_or_path: goes into the configuration; peft reads it when it is to find the base model by itself.
        task_type: peft's task type, for example "FEATURE_EXTRACTION" or "SEQ_CLS"; None for a plain PeftModel.
        rank_pattern: for AdaLoRA layers by module path, which ranks to keep; None keeps the ACTIVE ones. As in peft,
            the others are cut out of the file and the configuration says which they were.
        modules_to_save: names of trained modules without adapters, such as a classification head; as in peft, every
            module whose path ends with such a name is written as a whole.
        as_lora: write AdaLoRA layers as plain LoRA, with the gates inside A: A' = E ⊙ A, B' = B on the kept ranks, a
            rank and an alpha per layer. Layers without kept ranks are left out.
        settings: an allocator's settings for the configuration of an AdaLoRA adapter, whatever its strategy; where they
            have a budget in place of target_r, the rounded average of the kept ranks stands for it, and AdaLoRA's
            defaults for what another strategy does not have. None writes a schedule that is over, since the ranks are
            decided.

    Raises:
        TypeError, ValueError: naming what was found and expected, before anything is written: no adapter layers, LoRA
            and AdaLoRA layers mixed or AdaLoRA layers of different r, lora_alpha or lora_dropout (peft's format holds
            one of each; as_lora=True lifts all but the last), unknown names, patterns of another length, a wrapper of
            a class that is not known to be one.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: found the file {directory}, expected a directory or nothing")
    layers = _adapter_layers(model)
    saved_modules = _modules_to_save(model, modules_to_save, layers)
    kept = _kept_ranks(layers, rank_pattern)
    dropout = _one_value(layers, "lora_dropout")

    gated = {path: layer for path, layer in layers.items() if isinstance(layer, AdaLoRALinear)}
    if as_lora or not gated:
        plain = {path: _plain_adapter(layer, kept.get(path)) for path, layer in layers.items()}
        plain = {path: adapter for path, adapter in plain.items() if adapter.r > 0}
        if not plain:
            raise ValueError("rank_pattern: found no kept rank in any layer, expected at least one")
        targets = list(plain)
        config, tensors = _lora_files(plain)
    else:
        if len(gated) != len(layers):
            other = next(path for path in layers if path not in gated)
            raise ValueError(
                f"model: found LoRALinear at {other!r} and AdaLoRALinear at {next(iter(gated))!r}, expected one kind, "
                "since peft's format holds one; as_lora=True writes both as LoRA"
            )
        targets = list(gated)
        config, tensors = _adalora_files(gated, kept, settings)

    config |= {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "inference_mode": True,
        "target_modules": _target_modules(model, layers, targets),
        "modules_to_save": list(modules_to_save) or None,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    for path, module in saved_modules.items():
        for name, value in named_tensors(module):
            tensors[f"{path}.{name}"] = value
    # safetensors refuses tensors that share memory, as tied weights and slices do.
    owned = {
        PREFIX + name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    write_adapter_files(directory, config, owned)


def _adapter_layers(model: nn.Module) -> dict[str, LoRALinear | AdaLoRALinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected a torch.nn.Module")
    layers = {path: module for path, module in named_modules(model) if isinstance(module, (LoRALinear, AdaLoRALinear))}
    if not layers:
        raise ValueError(f"model: found no LoRALinear or AdaLoRALinear in {type(model).__name__}, expected some")
    if "" in layers:
        raise ValueError(f"model: found a {type(model).__name__} itself, expected a module that holds it")
    if all(path.startswith("module.") for path in layers) and _holds_only(unwrapped(model), "module"):
        raise ValueError(
            f"model: found {type(unwrapped(model)).__name__}, which holds nothing but `module`, as wrappers of a model "
            "do: its name would be in every tensor's; expected the model itself, model.module"
        )
    return layers


def _holds_only(module: nn.Module, name: str) -> bool:
    return [*module._modules] == [name] and not module._parameters and not module._buffers


def _modules_to_save(
    model: nn.Module, names: Sequence[str], layers: Mapping[str, LoRALinear | AdaLoRALinear]
) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise TypeError(f"modules_to_save: found the str {names!r}, expected a sequence of names")
    modules = _base_modules(model, layers)
    saved: dict[str, nn.Module] = {}
    for name in names:
        found = [path for path in modules if path.endswith(name)]
        if not found or not name:
            raise ValueError(f"modules_to_save: found {name!r}, which no module's path ends with")
        for path in found:
            inside = [layer for layer in layers if layer == path or layer.startswith(path + ".")]
            if inside:
                raise ValueError(
                    f"modules_to_save: found {name!r}, and the module {path!r} holds adapter {inside[0]!r}"
                )
            saved[path] = modules[path]
    return saved


def _base_modules(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of the base model by path: those of `model` without the inside of its adapter layers."""
    insides = tuple(path + "." for path in layers)
    places = named_places(model, remove_duplicate=False)
    return {path: place.module for path, place in places if path and not path.startswith(insides)}


def _kept_ranks(
    layers: Mapping[str, LoRALinear | AdaLoRALinear], rank_pattern: Mapping[str, Sequence[bool]] | None
) -> dict[str, Tensor]:
    gated = {path: layer for path, layer in layers.items() if isinstance(layer, AdaLoRALinear)}
    if rank_pattern is None:
        return {path: (layer.rank_state == RankState.ACTIVE).cpu() for path, layer in gated.items()}
    if rank_pattern.keys() != gated.keys():
        different = sorted(rank_pattern.keys() ^ gated.keys())
        raise ValueError(
            f"rank_pattern: found other layers than the model's AdaLoRALinear ones; on one side only: {different[:6]}"
        )
    for path, layer in gated.items():
        if len(rank_pattern[path]) != layer.r:
            raise ValueError(f"rank_pattern[{path!r}]: found {len(rank_pattern[path])} values, expected r = {layer.r}")
    return {path: torch.tensor([bool(keep) for keep in rank_pattern[path]], dtype=torch.bool) for path in gated}


def _one_value(layers: Mapping[str, Any], name: str) -> Any:
    values = {path: getattr(layer, name) for path, layer in layers.items()}
    if len(set(values.values())) > 1:
        (path, value), *rest = values.items()
        other, different = next(item for item in rest if item[1] != value)
        hint = "" if name == "lora_dropout" else "; as_lora=True writes one per layer"
        raise ValueError(
            f"model: found {name} {value} at {path!r} and {different} at {other!r}, expected one value for all layers, "
            f"since peft's format holds one{hint}"
        )
    return next(iter(values.values()))


def _plain_adapter(layer: LoRALinear | AdaLoRALinear, kept: Tensor | None) -> _PlainAdapter:
    if isinstance(layer, LoRALinear):
        return _PlainAdapter(layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.lora_alpha)
    assert kept is not None
    kept = kept.to(layer.lora_A.device)
    # float32 holds the product of two half-precision numbers exactly.
    dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
    gated_A = layer.lora_A.detach()[kept].to(dtype) * layer.lora_E.detach()[kept].to(dtype)
    return _PlainAdapter(gated_A, layer.lora_B.detach()[:, kept].to(dtype), layer.scaling * int(kept.sum()))


def _lora_files(adapters: Mapping[str, _PlainAdapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    r = Counter(adapter.r for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {
            _pattern_key(path, adapters): adapter.r for path, adapter in adapters.items() if adapter.r != r
        },
        "alpha_pattern": {
            _pattern_key(path, adapters): adapter.alpha for path, adapter in adapters.items() if adapter.alpha != alpha
        },
    }
    tensors = {}
    for path, adapter in adapters.items():
        tensors[f"{path}.lora_A.weight"] = adapter.lora_A
        tensors[f"{path}.lora_B.weight"] = adapter.lora_B
    return config, tensors


def _adalora_files(
    layers: Mapping[str, AdaLoRALinear], kept: Mapping[str, Tensor], settings: AllocatorSettings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    r = _one_value(layers, "r")
    total = sum(int(keep.sum()) for keep in kept.values())
    average = max(1, round(total / len(kept)))
    if settings is None:
        # AdaLoraConfig wants a schedule; peft reads it only when it goes on training.
        schedule = {"target_r": average, "total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        smoothing: dict[str, Any] = {"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
    else:
        schedule = {name: getattr(settings, name) for name in ("total_step", "tinit", "tfinal", "deltaT")}
        schedule["target_r"] = average if settings.target_r is None else settings.target_r
        smoothing = {name: getattr(settings, name, getattr(AdaLoraSettings, name)) for name in ("beta1", "beta2")}
        smoothing["orth_reg_weight"] = settings.orth_reg_weight
    pruned = not all(bool(keep.all()) for keep in kept.values())
    config = {
        "peft_type": "ADALORA",
        "init_r": r,
        "lora_alpha": _one_value(layers, "lora_alpha"),
        "rank_pattern": {f"{path}.lora_E": keep.tolist() for path, keep in kept.items()} if pruned else None,
        **schedule,
        **smoothing,
    }
    tensors = {}
    for path, layer in layers.items():
        keep = kept[path].to(layer.lora_A.device)
        tensors[f"{path}.lora_A"] = layer.lora_A.detach()[keep]
        tensors[f"{path}.lora_B"] = layer.lora_B.detach()[:, keep]
        tensors[f"{path}.lora_E"] = layer.lora_E.detach()[keep]
    return config, tensors


def _pattern_key(path: str, others: Iterable[str]) -> str:
    """A key for peft's rank_pattern and alpha_pattern, expressions for the end of a path, that hits only `path`."""
    hits = [other for other in others if re.match(rf"(.*\.)?({path})$", other)]
    return path if hits == [path] else f"^{re.escape(path)}"


def _target_modules(model: nn.Module, layers: Iterable[str], targets: Sequence[str]) -> list[str] | str:
    """The shortest of peft's ways to name exactly the modules in `targets`: last names, paths, or an expression."""
    paths = _base_modules(model, layers)
    for names in (sorted({path.rpartition(".")[2] for path in targets}), list(targets)):
        hits = [path for path in paths if path in names or path.endswith(tuple("." + name for name in names))]
        if sorted(hits) == sorted(targets):
            return names
    return "|".join(re.escape(path) for path in targets)
