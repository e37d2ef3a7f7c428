"""HF peft: adapters in its directory format, for which peft is not needed, and its models on our kernels, for which it
is."""

from peftkernels.integrations.peft.adapter_load import load_adapter
from peftkernels.integrations.peft.adapter_save import save_adapter
from peftkernels.integrations.peft.patch import apply_to_peft, frozen, revert, stats
from peftkernels.integrations.peft.report import Report, Stats
from peftkernels.integrations.peft.served import NotServedError

__all__ = [
    "NotServedError",
    "Report",
    "Stats",
    "apply_to_peft",
    "frozen",
    "load_adapter",
    "revert",
    "save_adapter",
    "stats",
]
