"""Rank budgets: deciding, while a model is fine-tuned, which ranks of its adapters are kept.

Of the folders, policies/ imports from run/, run/ and search/ from strategies/, and any of them from budget/, layers/
and logs/; none imports the other way.
"""

from peftkernels.allocation.budget.budgets import Budget, Group
from peftkernels.allocation.layers.gated import GatedLayer
from peftkernels.allocation.logs.card import adapter_card
from peftkernels.allocation.logs.decision_log import DecisionLog
from peftkernels.allocation.logs.observer import Observer
from peftkernels.allocation.logs.run_log import RunLog, read_log
from peftkernels.allocation.logs.tensorboard import TensorBoardScalars
from peftkernels.allocation.policies.rollback import RollbackPolicy
from peftkernels.allocation.policies.snapshot_ring import Snapshots
from peftkernels.allocation.run.adalora import AdaLoraAllocator
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.protocol import Allocator
from peftkernels.allocation.run.rates import AdaLoraRates, from_lora
from peftkernels.allocation.run.report import AllocationReport, ModuleAllocation
from peftkernels.allocation.run.snapshot import Snapshot
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

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
    "RollbackPolicy",
    "RunLog",
    "Snapshot",
    "Snapshots",
    "Statistics",
    "Strategy",
    "TensorBoardScalars",
    "adapter_card",
    "from_lora",
    "read_log",
]
