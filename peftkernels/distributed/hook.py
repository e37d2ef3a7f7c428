"""The communication hook for DistributedDataParallel."""

# Without `from __future__ import annotations`: DDP refuses a hook whose annotations are not the classes themselves.
import torch
import torch.distributed as dist

from peftkernels.distributed.live_ranks import LiveRanks


def live_rank_hook(state: LiveRanks, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook for DistributedDataParallel: averages the gradients of live ranks, packed into one buffer.

        model = DistributedDataParallel(module)
        allocator = AdaLoraAllocator(model, ...)
        model.register_comm_hook(LiveRanks(allocator), live_rank_hook)

    Of each bucket the rows of A, columns of B and gates that `LiveRanks` names, and everything else that is in it, are
    copied into one buffer, divided by the number of processes, summed by one all-reduce and copied back. Gradients are
    those of DDP without a hook: to the bit on two processes; on more, within rounding, since an element's place in a
    buffer decides the order in which a backend adds up the processes' parts.
    """
    buffer = bucket.buffer()
    return state.average(buffer, state.live_elements(bucket.parameters(), bucket.gradients(), buffer))
