"""Reading adapters from HF peft's adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels._module_names import Place, named_places, named_tensors
from peftkernels._reading import check_number, check_object, check_whole, shown
from peftkernels.integrations.peft.adapter_files import AdapterFiles, StoredTensor
from peftkernels.integrations.peft.adapter_save import PREFIX
from peftkernels.nn import AdaLoRALinear, LoRALinear
from peftkernels.ops.rank_plan import RankState

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
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class _Described:
    """One layer's adapter as the two files describe it, before a tensor is read.

    Attributes:
        path: the layer's, in the model.
        kind: the layer's class.
        r: the layer's rank.
        alpha: its lora_alpha.
        dropout: its lora_dropout.
        names: the layer's own names of its factors → names in the file.
        pattern: for AdaLoRA layers, which of the r ranks the factors hold; None where they hold all.
    """

    path: str
    kind: type[LoRALinear] | type[AdaLoRALinear]
    r: int
    alpha: float
    dropout: float
    names: Mapping[str, str]
    pattern: list[bool] | None

    def fits(self, module: LoRALinear | AdaLoRALinear) -> bool:
        """Return True if a layer is of this kind, rank and scaling."""
        return (type(module), module.r, module.lora_alpha) == (self.kind, self.r, self.alpha)


def load_adapter(model: nn.Module, directory: Path | str) -> None:
    """Read an adapter that peft or `save_adapter` wrote into `model`, in place.

    Where the file has an adapter, `model` has either a layer of the same kind, rank and scaling, which is filled, or
    a plain `nn.Linear`, which is replaced by a new layer. An AdaLoRA file holds only the ranks that were kept: they
    return to their places as ACTIVE, the others are zero and DEAD. Trained modules saved whole are copied over those
    of `model`. Names are those of the model without torch.compile, DDP, FSDP and activation checkpointing around it.

    All of it, or nothing: after any error the model is what it was. The expressions in `alpha_pattern` are run as they
    are: SECURITY.md says what that means.

    Args:
        model: the model that the adapter belongs to.
        directory: the folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: before a tensor is read, for a file that cannot be read, two files of different saves, a
            configuration that these layers do not compute, a module that is missing or of another kind, rank, scaling
            or shape, factors that are no floating-point numbers, and adapter layers of the model that the file does
            not have.
    """
    files = AdapterFiles(Path(directory))
    _check_config(files)
    stored = _by_model_name(files)
    places = dict(named_places(model))
    described = _describe(files, stored)
    _check_layers(places, described)
    for adapter in described:
        _check_module(places, adapter, files)
    factors = {name for adapter in described for name in adapter.names.values()}
    whole = _whole_tensors(model, {name: key for name, key in stored.items() if key not in factors}, files)

    _take_over([(places[adapter.path], adapter) for adapter in described], whole, files.load())


def _check_config(files: AdapterFiles) -> None:
    config, path = files.config, files.config_path
    if config.get("peft_type") not in ("LORA", "ADALORA"):
        raise ValueError(f"{path}: found peft_type {shown(config.get('peft_type'))}, expected 'LORA' or 'ADALORA'")
    for name, unused in _UNSUPPORTED.items():
        if config.get(name) not in (unused, None, False, [], {}):
            raise ValueError(
                f"{path}: found {name} = {shown(config[name])}, expected {unused!r}, all these layers compute"
            )
    check_number(config.get("lora_alpha"), f"{path}: lora_alpha")
    dropout = check_number(config.get("lora_dropout") or 0.0, f"{path}: lora_dropout")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{path}: lora_dropout: found {dropout}, expected a probability in [0, 1]")
    for name in ("rank_pattern", "alpha_pattern"):
        check_object(config.get(name) or {}, f"{path}: {name}")


def _by_model_name(files: AdapterFiles) -> dict[str, str]:
    """Names in the model → names in the file, which may begin with the name of peft's own module."""
    names: dict[str, str] = {}
    for key in files.tensors:
        name = key.removeprefix(PREFIX)
        if name in names:
            raise ValueError(f"{files.weights_path}: found both {names[name]!r} and {key!r}, expected {name!r} once")
        names[name] = key
    return names


def _describe(files: AdapterFiles, stored: Mapping[str, str]) -> list[_Described]:
    config = files.config
    gated = config["peft_type"] == "ADALORA"
    factors = ("lora_A", "lora_B", "lora_E") if gated else ("lora_A.weight", "lora_B.weight")
    suffix = "." + factors[0]
    paths = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
    if not paths:
        raise ValueError(f"{files.weights_path}: found no tensor named ...{suffix}, expected the factors of an adapter")
    alphas = _alphas(config, paths, files.config_path)
    dropout = float(config.get("lora_dropout") or 0.0)
    described = []
    for path in paths:
        names = {}
        for factor in factors:
            if f"{path}.{factor}" not in stored:
                raise ValueError(f"{files.weights_path}: found no {path}.{factor}, expected it beside {path}{suffix}")
            names[factor] = stored[f"{path}.{factor}"]
            _check_factor(files.tensors[names[factor]], f"{files.weights_path}: {path}.{factor}")
        held = files.tensors[names[factors[0]]].shape[0]
        if gated:
            r, pattern = _ranks(path, held, files)
            described.append(_Described(path, AdaLoRALinear, r, config["lora_alpha"], dropout, names, pattern))
        else:
            check_whole(held, f"{files.weights_path}: ranks of {path}.lora_A.weight", least=1)
            described.append(_Described(path, LoRALinear, held, alphas[path], dropout, names, None))
    return described


def _check_factor(stored: StoredTensor, where: str) -> None:
    if len(stored.shape) != 2 or stored.dtype not in _FLOATS:
        raise ValueError(f"{where}: found {stored.shape} {stored.dtype}, expected a matrix of floating-point numbers")


def _alphas(config: Mapping[str, Any], paths: Iterable[str], source: Path) -> dict[str, float]:
    """lora_alpha of each layer: of the first expression in alpha_pattern that matches the end of its path."""
    patterns = []
    for key, alpha in (config.get("alpha_pattern") or {}).items():
        where = f"{source}: alpha_pattern[{key!r}]"
        try:
            patterns.append((re.compile(rf"(.*\.)?({key})$"), float(check_number(alpha, where))))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{where}: found no regular expression ({error})") from None
    found = {path: next((alpha for pattern, alpha in patterns if pattern.match(path)), None) for path in paths}
    return {path: config["lora_alpha"] if alpha is None else alpha for path, alpha in found.items()}


def _ranks(path: str, held: int, files: AdapterFiles) -> tuple[int, list[bool] | None]:
    """r of an AdaLoRA layer whose factors hold `held` ranks, and which of the r they are; None for all."""
    r = check_whole(files.config.get("init_r"), f"{files.config_path}: init_r", least=1)
    key = f"{path}.lora_E"
    pattern = (files.config.get("rank_pattern") or {}).get(key)
    where = f"{files.config_path}: rank_pattern[{key!r}]"
    if pattern is not None and not (isinstance(pattern, list) and all(isinstance(keep, bool) for keep in pattern)):
        raise ValueError(f"{where}: found {shown(pattern)}, expected a list of true and false")
    length, kept = (r, r) if pattern is None else (len(pattern), sum(pattern))
    if (length, kept) != (r, held):
        raise ValueError(
            f"{where}: found {length} ranks, {kept} of them kept, and {held} ranks in {path}.lora_A, "
            f"expected init_r = {r} ranks and as many kept as in the factors"
        )
    return r, pattern


def _check_layers(places: Mapping[str, Place], described: Iterable[_Described]) -> None:
    adapted = {path for path, place in places.items() if isinstance(place.module, (LoRALinear, AdaLoRALinear))}
    left = sorted(adapted - {adapter.path for adapter in described})
    if left:
        raise ValueError(f"model: found adapter layers that the file does not have, {', '.join(left[:6])}")


def _check_module(places: Mapping[str, Place], adapter: _Described, files: AdapterFiles) -> None:
    """Raise where the model's module cannot take the adapter."""
    path = adapter.path
    if path not in places:
        raise ValueError(f"model: found no module {path!r}, for which the file has an adapter")
    place = places[path]
    module = place.module
    expected = f"{adapter.kind.__name__} with r={adapter.r}, lora_alpha={adapter.alpha} as in the file"
    if isinstance(module, (LoRALinear, AdaLoRALinear)):
        if not adapter.fits(module):
            raise ValueError(
                f"model: found {type(module).__name__} with r={module.r}, lora_alpha={module.lora_alpha} at {path!r}, "
                f"expected {expected}"
            )
    elif not isinstance(module, nn.Linear):
        raise TypeError(f"model: found {type(module).__name__} at {path!r}, expected nn.Linear or {expected}")
    elif place.holder is None or place.attribute != path.rpartition(".")[2]:
        raise TypeError(
            f"model: found a {type(place.holder).__name__} around the linear layer at {path!r}, expected the layer "
            "itself: load first, wrap afterwards"
        )
    weights = files.weights_path
    held = adapter.r if adapter.pattern is None else sum(adapter.pattern)
    shapes = {"lora_A": (held, module.in_features), "lora_B": (module.out_features, held), "lora_E": (held, 1)}
    for name, key in adapter.names.items():
        found, wanted = files.tensors[key].shape, shapes[name.removesuffix(".weight")]
        if found != wanted:
            raise ValueError(
                f"{weights}: {path}.{name}: found {found} in the file, expected {wanted} for the model's layer"
            )


def _whole_tensors(model: nn.Module, stored: Mapping[str, str], files: AdapterFiles) -> list[tuple[Tensor, str]]:
    """The model's tensors that the file has whole, each with its name in the file."""
    own = dict(named_tensors(model))
    pairs = []
    for name, key in stored.items():
        if name not in own:
            raise ValueError(f"{files.weights_path}: found the tensor {name!r}, which the model does not have")
        found, target = files.tensors[key], own[name]
        if found.shape != tuple(target.shape):
            raise ValueError(
                f"{files.weights_path}: {name}: found {found.shape} in the file, expected {tuple(target.shape)}"
            )
        if target.is_floating_point() != (found.dtype in _FLOATS):
            raise ValueError(f"{files.weights_path}: {name}: found {found.dtype}, expected the model's {target.dtype}")
        pairs.append((target, key))
    return pairs


def _take_over(
    adapters: Sequence[tuple[Place, _Described]], whole: Sequence[tuple[Tensor, str]], read: Mapping[str, Tensor]
) -> None:
    """Put adapters and whole tensors into the model. After an error, an interruption among them, it is as before."""
    with ExitStack() as undo, torch.no_grad():
        for place, adapter in adapters:
            module, state = place.module, {name: read[key] for name, key in adapter.names.items()}
            if adapter.kind is AdaLoRALinear:
                state = _spread_ranks(adapter.r, adapter.pattern, state)
            if isinstance(module, (LoRALinear, AdaLoRALinear)):
                before = {name: module.state_dict()[name].clone() for name in state}
                undo.callback(_refill, module, before, module.merged)
                module.load_state_dict(state, strict=False)
                continue
            assert isinstance(module, nn.Linear) and place.holder is not None
            for parameter in module.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            layer = adapter.kind.from_linear(module, adapter.r, adapter.alpha, adapter.dropout)
            layer.load_state_dict(state, strict=False)
            undo.callback(setattr, place.holder, place.attribute, module)
            setattr(place.holder, place.attribute, layer)
        for target, key in whole:
            undo.callback(target.copy_, target.clone())
            target.copy_(read[key])
        undo.pop_all()


def _refill(layer: LoRALinear | AdaLoRALinear, state: dict[str, Tensor], merged: bool) -> None:
    layer.load_state_dict(state, strict=False)
    if merged:
        layer.merge()


def _spread_ranks(r: int, pattern: list[bool] | None, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors at the layer's full rank: kept ranks in their places, zeros elsewhere, and the states to that."""
    keep = torch.ones(r, dtype=torch.bool) if pattern is None else torch.tensor(pattern, dtype=torch.bool)
    spread = {}
    for name, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
        value = factors[name]
        shape = list(value.shape)
        shape[dim] = r
        spread[name] = value.new_zeros(shape).index_copy_(dim, keep.nonzero().squeeze(1), value)
    spread["rank_state"] = torch.where(keep, int(RankState.ACTIVE), int(RankState.DEAD)).to(torch.uint8)
    return spread
