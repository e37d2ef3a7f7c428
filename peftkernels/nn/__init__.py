"""Drop-in layers: a frozen `torch.nn.Linear` with a low-rank adapter of fixed (LoRA) or masked (AdaLoRA) ranks."""

from peftkernels.nn.adalora_linear import DEFAULT_ADALORA_SCALE, AdaLoRALinear
from peftkernels.nn.lora_linear import LoRALinear

__all__ = ["DEFAULT_ADALORA_SCALE", "AdaLoRALinear", "LoRALinear"]
