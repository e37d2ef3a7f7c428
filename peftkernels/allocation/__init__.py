"""Rank budgets: deciding, while a model is fine-tuned, which ranks of its adapters stay alive."""

from peftkernels.allocation.adalora import AdaLoraAllocator
from peftkernels.allocation.budgets import Budget, Group
from peftkernels.allocation.engine import BudgetAllocator
from peftkernels.allocation.observer import Observer
from peftkernels.allocation.protocol import Allocator, GatedLayer
from peftkernels.allocation.report import AllocationReport, ModuleAllocation
from peftkernels.allocation.rollback import RollbackPolicy
from peftkernels.allocation.snapshot import Snapshot
from peftkernels.allocation.snapshot_ring import Snapshots
from peftkernels.allocation.statistics import Statistics
from peftkernels.allocation.strategy import Strategy

__all__ = [
    "AdaLoraAllocator",
    "AllocationReport",
    "Allocator",
    "Budget",
    "BudgetAllocator",
    "GatedLayer",
    "Group",
    "ModuleAllocation",
    "Observer",
    "RollbackPolicy",
    "Snapshot",
    "Snapshots",
    "Statistics",
    "Strategy",
]
