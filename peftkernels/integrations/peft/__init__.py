"""HF peft: adapters in its directory format, adapter_config.json and adapter_model.safetensors; peft is not needed."""

from peftkernels.integrations.peft.adapter_load import load_adapter
from peftkernels.integrations.peft.adapter_save import save_adapter

__all__ = ["load_adapter", "save_adapter"]
