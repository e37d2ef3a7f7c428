"""Rank budgets: deciding, while a model is fine-tuned, which ranks of its adapters stay alive."""

from peftkernels.allocation.adalora import AdaLoraAllocator, AdaLoraSnapshot
from peftkernels.allocation.protocol import Allocator, GatedLayer
from peftkernels.allocation.rates import AdaLoraRates, from_lora
from peftkernels.allocation.report import AllocationReport, ModuleAllocation

__all__ = [
    "AdaLoraAllocator",
    "AdaLoraRates",
    "AdaLoraSnapshot",
    "AllocationReport",
    "Allocator",
    "GatedLayer",
    "ModuleAllocation",
    "from_lora",
]
