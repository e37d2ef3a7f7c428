"""Knowing from which checkpoint a Trainer loads an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkernels.integrations.transformers.checkpoint_state import state_folder


class WatchedLoad:
    """`load_adapter` of one peft model, which stays what it is and says which folder the trained adapter came from.

    A checkpoint with a file of `write_state` holds every rank. A model whose adapter has a rank_pattern, since it was
    trained before, would be cut before it is loaded; the pattern is put aside for such a folder. Half-precision
    adapters keep their dtype.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.folder: Path | None = None

    def __call__(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        model, load = self._model, type(self._model).load_adapter
        if adapter_name != getattr(model.base_model, "trainable_adapter_name", None):
            return load(model, model_id, adapter_name, *args, **kwargs)
        config, folder = model.peft_config[adapter_name], state_folder(model_id)
        own = [value for name, value in model.named_parameters() if name.endswith(f".lora_A.{adapter_name}")]
        if len(args) < 3 and any(value.dtype in (torch.float16, torch.bfloat16) for value in own):
            kwargs.setdefault("autocast_adapter_dtype", False)
        pattern = config.rank_pattern
        if folder is not None:
            config.rank_pattern = None
        try:
            loaded = load(model, model_id, adapter_name, *args, **kwargs)
        except BaseException:
            config.rank_pattern = pattern
            raise
        self.folder = Path(model_id) if folder is None else folder
        return loaded


def watch_load(model: nn.Module) -> WatchedLoad | None:
    """Watch `load_adapter` of the peft model inside `model`, this instance only; None where there is none."""
    try:
        from peft import PeftModel
    except ImportError:
        return None
    for module in model.modules():
        if isinstance(module, PeftModel) and hasattr(module.base_model, "rankallocator"):
            present = vars(module).get("load_adapter")
            if not isinstance(present, WatchedLoad):
                present = WatchedLoad(module)
                vars(module)["load_adapter"] = present
            return present
    return None
