"""JSON inside a state of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkernels._reading import check_object, parse_json

METADATA = "metadata"


def encode(facts: Mapping[str, Any]) -> Tensor:
    """Facts as the uint8 tensor of their JSON's bytes."""
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def decode(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The facts under "metadata" of a state; raises ValueError where there are none."""
    metadata = state.get(METADATA) if isinstance(state, Mapping) else None
    if not isinstance(metadata, Tensor) or metadata.dtype != torch.uint8 or metadata.dim() != 1:
        found = type(state).__name__ if not isinstance(state, Mapping) else type(metadata).__name__
        raise ValueError(f"state[{METADATA!r}]: found {found}, expected the bytes of state_dict()")
    try:
        return check_object(parse_json(bytes(metadata.tolist()), "its text"), "its text")
    except ValueError as error:
        raise ValueError(f"state[{METADATA!r}]: {error}, expected the bytes of state_dict()") from None
