"""Training on several processes: fewer gradients to send, and the certainty that all processes decide alike."""

from peftkernels.distributed.agreement import DivergenceCheck, check_agreement
from peftkernels.distributed.hook import live_rank_hook
from peftkernels.distributed.live_ranks import LiveRanks
from peftkernels.distributed.replicated import adapter_parameters, average_adapter_gradients, average_loss

__all__ = [
    "DivergenceCheck",
    "LiveRanks",
    "adapter_parameters",
    "average_adapter_gradients",
    "average_loss",
    "check_agreement",
    "live_rank_hook",
]
