"""HF peft's forward passes on `lora_linear` for modules that keep nothing of ours: no class, no settings, no counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkernels.integrations.peft.classes import CLASSES
from peftkernels.integrations.peft.layers import served_or_reason
from peftkernels.integrations.peft.served import Service

# One for all modules, so nothing may be kept in it.
_SERVICE = Service()


def forward(module: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """y (..., N) of x (..., K), on `lora_linear` where that can serve, else by the forward of the module's class."""
    kind: Any = CLASSES.get(type(module))
    names = [name for name in module.active_adapters if name in module.lora_A]
    if kind is not None and names and not (module.disable_adapters or module.merged):
        found = served_or_reason(kind, module, x, names, args, kwargs, _SERVICE)
        if not isinstance(found, str):
            return found
    own: Tensor = type(module).forward(module, x, *args, **kwargs)
    return own
