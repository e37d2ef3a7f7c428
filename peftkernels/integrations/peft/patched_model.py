"""What all patched modules of a model share: how they were patched, and where the model is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class PatchedModel:
    """One call of `apply_to_peft`, so that layers that peft adds later are patched as the first were.

    peft makes layers in several ways (`add_adapter`, `load_adapter`, transformers' own), but each tells every adapted
    layer which adapter is active from then on. A name that was not heard before means that there may be new layers.

    Args:
        model: the model that was patched.
        lora: True where its LoRA layers were.
        adalora: True where its AdaLoRA layers were.
        impl: the implementation of `lora_linear`.
        strict: True to raise where a call cannot be served.
        patch_new: patches the layers of the model that came with adapters of these names.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: bool,
        adalora: bool,
        impl: str,
        strict: bool,
        patch_new: Callable[[nn.Module, PatchedModel, set[str]], None],
    ) -> None:
        self.lora, self.adalora, self.impl, self.strict = lora, adalora, impl, strict
        self._patch_new = patch_new
        # Weakly: the model goes with its last reference, not with the garbage collector.
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._known: set[str] = set()

    @property
    def model(self) -> nn.Module | None:
        """The model, if it is alive and this was not read from a file."""
        return None if self._model is None else self._model()

    def activated(self, names: str | Iterable[str]) -> None:
        """These adapters are active from now on: patch the layers that came with them.

        Raises:
            NotServedError: under ``strict``, one of them cannot be served.
        """
        new = {names} if isinstance(names, str) else set(names)
        model = self.model
        if new <= self._known or model is None:
            return
        self._patch_new(model, self, new)
        self._known |= new

    def deleted(self, name: str) -> None:
        """An adapter is gone: another of its name may be on other layers."""
        self._known.discard(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedModel:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self), _known=set(self._known), _model=None)
        memo[id(self)] = copied
        model = self.model
        # A copy of the whole model, or of a layer alone.
        if model is not None and id(model) in memo:
            copied._model = weakref.ref(memo[id(model)])
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}
