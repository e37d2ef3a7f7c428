"""A model's modules by the names they have in it, whatever it is wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# Modules that stand for one other module: where each class lives, and under which name it holds the other.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)

_PRIVATE = {attribute for *_, attribute in _WRAPPERS if attribute.startswith("_")}


@dataclass(frozen=True)
class Place:
    """A module, and the module and attribute that hold it; `holder` is None for the whole model."""

    module: nn.Module
    holder: nn.Module | None
    attribute: str


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel, DataParallel, FullyShardedDataParallel and activation
    checkpointing, however many of them; `module` itself where it is none of these."""
    return _unwrapped(Place(module, None, "")).module


def named_places(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Place]]:
    """What `model.named_modules` gives, without wrappers and with the names of a model that has none.

    A module is a wrapper by its class: one of the user's own that is called `module` keeps its name.
    """
    return _walk(Place(model, None, ""), "", set() if remove_duplicate else None)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without wrappers: see `named_places`."""
    return ((name, place.module) for name, place in named_places(model))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and persistent buffers of a model by the names of its state_dict without wrappers; those that
    are shared under each of their names."""
    for path, place in named_places(model, remove_duplicate=False):
        module = place.module
        buffers = {
            name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def names_without_wrappers(names: Sequence[str]) -> list[str]:
    """Names that were written down when nobody saw the model: without what torch calls the inside of its wrappers, and
    without `module.` where all of them begin with it. Good for comparing, not for writing: a user's own module may be
    called `module`."""
    bare = [".".join(part for part in name.split(".") if part not in _PRIVATE) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def _walk(place: Place, name: str, seen: set[nn.Module] | None) -> Iterator[tuple[str, Place]]:
    place = _unwrapped(place)
    if seen is not None:
        if place.module in seen:
            return
        seen.add(place.module)
    yield name, place
    for attribute, child in place.module._modules.items():
        if child is not None:
            path = f"{name}.{attribute}" if name else attribute
            yield from _walk(Place(child, place.module, attribute), path, seen)


def _unwrapped(place: Place) -> Place:
    while (attribute := _inner_name(place.module)) is not None:
        inner = place.module._modules[attribute]
        assert inner is not None
        place = Place(inner, place.module, attribute)
    return place


def _inner_name(module: nn.Module) -> str | None:
    for where, name, attribute in _WRAPPERS:
        # A class of a module that nobody imported has no instances.
        kind = getattr(sys.modules.get(where), name, None)
        if kind is not None and isinstance(module, kind):
            return attribute
    return None
