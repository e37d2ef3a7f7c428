"""Rank budgets: deciding, while a model is fine-tuned, which ranks of its adapters stay alive."""

from peftkernels.allocation.adalora import AdaLoraAllocator
from peftkernels.allocation.budgets import Budget, Group
from peftkernels.allocation.card import adapter_card
from peftkernels.allocation.decision_log import DecisionLog
from peftkernels.allocation.engine import BudgetAllocator
from peftkernels.allocation.observer import Observer
from peftkernels.allocation.protocol import Allocator, GatedLayer
from peftkernels.allocation.rates import AdaLoraRates, from_lora
from peftkernels.allocation.report import AllocationReport, ModuleAllocation
from peftkernels.allocation.run_log import RunLog, read_log
from peftkernels.allocation.snapshot import Snapshot
from peftkernels.allocation.statistics import Statistics
from peftkernels.allocation.strategy import Strategy
from peftkernels.allocation.tensorboard import TensorBoardScalars

__all__ = [
    "AdaLoraAllocator",
    "AdaLoraRates",
    "AllocationReport",
    "Allocator",
    "Budget",
    "BudgetAllocator",
    "DecisionLog",
    "GatedLayer",
    "Group",
    "ModuleAllocation",
    "Observer",
    "RunLog",
    "Snapshot",
    "Statistics",
    "Strategy",
    "TensorBoardScalars",
    "adapter_card",
    "from_lora",
    "read_log",
]
