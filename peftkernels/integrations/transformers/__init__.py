"""Hugging Face transformers: the ranks of an AdaLoRA model allocated while its Trainer, or one of trl, runs."""

from peftkernels.integrations.transformers.adalora_callback import FROM_TRAINER, AdaLoraCallback

__all__ = ["FROM_TRAINER", "AdaLoraCallback"]
