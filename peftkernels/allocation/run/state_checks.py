"""Checks of the parts of a saved state, made before any of it is taken over; errors name the part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peftkernels._reading import shown
from peftkernels.allocation.run.json_tensor import METADATA

FACTS = f"state[{METADATA!r}]"
"""What errors call the JSON part of a state."""


def fact(name: str) -> str:
    """What errors call a fact of the JSON part of a state."""
    return f"{FACTS}: {name}"


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has names that begin with `prefix`, by the names without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


@contextmanager
def within(where: str) -> Iterator[None]:
    """Say in the ValueErrors of the block which part of a larger state they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_names(found: Any, expected: Collection[str], where: str = "state") -> None:
    """Check that `found` has exactly the names `expected`.

    Raises:
        ValueError: Naming the first difference.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: found {shown(found)}, expected what state_dict() gave")
    for name in expected:
        if name not in found:
            raise ValueError(f"{where}: {name}: found nothing, expected what state_dict() gave")
    for name in found:
        if name not in expected:
            wanted = ", ".join(expected) if len(expected) < 10 else "the names that state_dict() gave"
            raise ValueError(f"{where}: {name}: found an unknown name, expected {wanted or 'none'}")


def check_settings(found: Mapping[str, Any], expected: Mapping[str, Any], who: str) -> None:
    """Check that what saved a state had the settings `expected`.

    Args:
        found: The saved settings.
        expected: The settings of what loads it.
        who: What saved it, in words.

    Raises:
        ValueError: With every difference.
    """
    differences = [
        f"{name} (found {found.get(name)!r}, expected {value!r})"
        for name, value in expected.items()
        if found.get(name) != value or isinstance(found.get(name), bool) != isinstance(value, bool)
    ]
    differences += [f"{name} (found {value!r}, expected none)" for name, value in found.items() if name not in expected]
    if differences:
        raise ValueError(f"state: it was saved by {who} with other settings: {', '.join(differences)}")


def check_tensor(
    found: Mapping[str, Any], name: str, shape: torch.Size, dtype: torch.dtype, prefix: str = ""
) -> Tensor:
    """Return found[name] if it is a tensor of this shape and dtype; raise ValueError otherwise, as those below do."""
    own = found.get(name)
    if not (isinstance(own, Tensor) and own.shape == shape and own.dtype == dtype):
        raise ValueError(f"state[{prefix + name!r}]: found {_described(own)}, expected {tuple(shape)} {dtype}")
    return own


def check_floats(found: Mapping[str, Any], name: str, shape: torch.Size | None) -> Tensor:
    """Return found[name] where it has floating-point numbers and this shape, or any length where `shape` is None."""
    own = found.get(name)
    if (
        isinstance(own, Tensor)
        and own.is_floating_point()
        and (own.dim() == 1 if shape is None else own.shape == shape)
    ):
        return own
    wanted = "a tensor of one dimension" if shape is None else tuple(shape)
    raise ValueError(f"state[{name!r}]: found {_described(own)}, expected {wanted} of floating-point numbers")


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`, found under `name`, where all its numbers are finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"state[{name!r}]: found {shown(tensor.tolist())}, expected finite numbers")
    return tensor


def check_not_negative(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`, found under `name`, where all its numbers are finite and at least 0."""
    if bool((check_finite(tensor, name) < 0).any()):
        raise ValueError(f"state[{name!r}]: found {shown(tensor.tolist())}, expected at least 0")
    return tensor


def _described(own: Any) -> str:
    if isinstance(own, Tensor):
        return f"{tuple(own.shape)} {own.dtype}"
    return "nothing" if own is None else shown(own)
