"""Which allocator decides the ranks of a layer: one at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

# Both sides weakly: a layer or an allocator that is no longer referred to is no part of it.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_free(layers: Mapping[str, Any]) -> None:
    """Raise ValueError, naming one, where a layer has an allocator already that was not closed."""
    if _taken(layers) is not None:
        # One that was deleted may still wait, in a cycle of references, to be collected.
        gc.collect()
    name = _taken(layers)
    if name is not None:
        raise ValueError(
            f"layers[{name!r}]: found an allocator that decides its ranks already, expected none; call close() on that "
            "one first, or delete it"
        )


def take_layers(allocator: Any, layers: Mapping[str, Any]) -> None:
    """`allocator` decides the ranks of these layers, which were free."""
    for layer in layers.values():
        _owners[layer] = weakref.ref(allocator)


def leave_layers(allocator: Any, layers: Mapping[str, Any]) -> None:
    """The layers that `allocator` has are free."""
    for layer in layers.values():
        if _owner(layer) is allocator:
            del _owners[layer]


def _taken(layers: Mapping[str, Any]) -> str | None:
    return next((name for name, layer in layers.items() if _owner(layer) is not None), None)


def _owner(layer: Any) -> Any:
    reference = _owners.get(layer)
    return None if reference is None else reference()
