"""Kernels for low-rank adapters on frozen weights: the frozen matmul plus the masked low-rank delta in one pass."""

import importlib
from typing import TYPE_CHECKING, Any

from peftkernels._version import __version__
from peftkernels.backends.backend import Backend
from peftkernels.backends.registry import Explanation
from peftkernels.backends.registry import register as register_backend
from peftkernels.functional import LoraLinearFunction, explain, lora_linear, shared_shrink, weights_changed
from peftkernels.ops.rank_plan import RankPlan, RankState

if TYPE_CHECKING:
    from peftkernels.integrations.peft import apply_to_peft, revert, stats

__all__ = [
    "Backend",
    "Explanation",
    "LoraLinearFunction",
    "RankPlan",
    "RankState",
    "__version__",
    "apply_to_peft",
    "explain",
    "lora_linear",
    "register_backend",
    "revert",
    "shared_shrink",
    "stats",
    "weights_changed",
]


def __getattr__(name: str) -> Any:
    # The operator's users do not load what integrates it.
    if name in ("apply_to_peft", "revert", "stats"):
        from peftkernels.integrations import peft

        return getattr(peft, name)
    if name == "layers":  # where Hugging Face's kernels looks for them
        return importlib.import_module("peftkernels.layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
