"""Which modules may be left out of a call: our forward computes what the modules inside do, without calling them."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (Tensor, nn.Parameter)
# What each class computes, as long as the function was not exchanged for all of its instances.
KNOWN_FORWARDS: dict[type, Any] = {
    kind: kind.forward for kind in (nn.Linear, Conv1D, nn.Identity, nn.Dropout, DoraLinearLayer)
}


def bypass_reason(module: nn.Module, name: str, kinds: tuple[type, ...]) -> str | None:
    """Why the module must be called, None where what it computes is known and no hook waits for its call.

    Args:
        module: a part of an adapted layer.
        name: what it is, for the reason, such as "the base layer".
        kinds: the classes that it may be of, exactly; each in `KNOWN_FORWARDS`.
    """
    kind = type(module)
    if kind not in kinds:
        return f"{name} is a {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    known = KNOWN_FORWARDS[kind]
    if kind.forward is not known or ("forward" in module.__dict__ and not _is_method(module.forward, known, module)):
        return f"{name} has a forward of its own"
    return None


def _is_method(found: Any, function: Any, module: nn.Module) -> bool:
    """Return True for the module's own method: accelerate's hooks leave it on the instance when they are removed."""
    return getattr(found, "__func__", None) is function and found.__self__ is module
