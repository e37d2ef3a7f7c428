"""The file that carries the state of rank allocation in a checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkernels._files import write_atomically
from peftkernels._reading import check_text, check_whole, parse_json

STATE_NAME = "adalora_state.safetensors"
_METADATA = "peftkernels"
_FORMAT = 1


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write STATE_NAME into a folder: tensors by name, and facts as JSON in the header. All of it, or nothing."""
    from safetensors.torch import save

    owned = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": "pt", _METADATA: json.dumps({"format": _FORMAT, **facts}, allow_nan=False)}
    data = save(owned, metadata=header)
    write_atomically(folder / STATE_NAME, lambda file: file.write(data))


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts that `write_state` wrote.

    Raises:
        ValueError: a file of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STATE_NAME
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: found no readable safetensors file ({error})") from error
    facts = parse_json(header.get(_METADATA, "null").encode(), f"{path}: header")
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path}: found format {found!r}, expected {_FORMAT} as AdaLoraCallback writes it")
    return tensors, facts


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `read_state` gives, of a training: with its kind and its step.

    Raises:
        ValueError: naming the file, for a file of another kind and where these are missing.
    """
    tensors, facts = read_state(folder)
    check_text(facts.get("kind"), f"{folder / STATE_NAME}: kind")
    check_whole(facts.get("step"), f"{folder / STATE_NAME}: step")
    return tensors, facts


def state_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The folder that holds STATE_NAME: this one, or the one above where an adapter lies in a folder of its own."""
    path = Path(folder)
    return next((place for place in (path, path.parent) if (place / STATE_NAME).is_file()), None)


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """How two sets of parameters differ, in words; None where they are equal to the bit."""
    unknown = sorted(expected.keys() ^ found.keys())
    if unknown:
        return f"{unknown[0]} on one side only"
    for name, tensor in expected.items():
        other = found[name].detach().to("cpu")
        if tensor.shape != other.shape:
            return f"{name} of shape {tuple(tensor.shape)} and {tuple(other.shape)}"
        if not torch.equal(tensor, other.to(tensor.dtype)):
            return f"different values of {name}"
    return None
