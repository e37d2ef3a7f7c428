"""Kernels for low-rank adapters on frozen weights: the frozen matmul plus the masked low-rank delta in one pass."""

from peftkernels._version import __version__
from peftkernels.dispatch import Explanation
from peftkernels.functional import explain, lora_linear
from peftkernels.rank_plan import RankPlan, RankState

__all__ = ["Explanation", "RankPlan", "RankState", "__version__", "explain", "lora_linear"]
