"""What is remembered of frozen weights between calls, and how it is forgotten when a weight was changed unseen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftkernels.backends import cpu

_generations = itertools.count(1)
_generation = 0


def generation() -> int:
    """A number that is another one after every `weights_changed`.

    Whatever is computed from frozen weights and kept is kept with this number, read before computing, and used only
    while the number is the same.
    """
    return _generation


def weights_changed(module_or_tensor: nn.Module | Tensor) -> None:
    """Forget what is kept of a frozen weight, or of all weights of a module, that was written behind torch's back.

    A weight that is changed by torch's own in-place operations needs no such call. One that is changed through `.data`,
    numpy, DLPack or another process's shared memory does: the next call then packs it anew.

    May be called from any thread; what another thread is packing at the time is not kept. Calls in compiled programs
    see the change too.

    Args:
        module_or_tensor: a module: every parameter, buffer and tensor attribute of it and of what is inside it; a
            tensor: that tensor, its views and every other tensor in the same memory.

    Raises:
        TypeError: anything else.
    """
    global _generation
    if isinstance(module_or_tensor, Tensor):
        tensors = iter((module_or_tensor,))
    elif isinstance(module_or_tensor, nn.Module):
        tensors = _tensors_of(module_or_tensor)
    else:
        raise TypeError(
            f"module_or_tensor: found {type(module_or_tensor).__name__}, expected a torch.nn.Module or a tensor"
        )
    for tensor in tensors:
        for plain in _in_memory(tensor):
            cpu.forget_weight(plain)
    _generation = next(_generations)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():  # such as the views that a sharded module's weights are
        yield from (value for value in list(vars(part).values()) if isinstance(value, Tensor))


def _in_memory(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those inside it where it is a subclass made of others."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _in_memory(getattr(tensor, name))
