"""Adapters that every process holds whole, beside a frozen model that FSDP2 shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftkernels.allocation.layers.gated import FACTORS, find_gated_layers
from peftkernels.distributed.live_ranks import LiveRanks


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """lora_A, lora_B and lora_E of every AdaLoRALinear layer, for `fully_shard` to leave alone:

        fully_shard(model, ignored_params=adapter_parameters(model))

    They then stay whole on every process, which must start with the same values, and `average_adapter_gradients` does
    what FSDP does for the others.

    Raises:
        ValueError: the model has no such layers.
    """
    layers = find_gated_layers(model).values()
    found = {getattr(layer, factor) for layer in layers for factor in FACTORS}
    return {parameter for parameter in found if isinstance(parameter, nn.Parameter)}


@torch.no_grad()
def average_adapter_gradients(live_ranks: LiveRanks) -> None:
    """Average the gradients of an allocator's layers over the processes, live ranks only, in one all-reduce per dtype.

    Call it once per optimizer step, after the last backward() and before gradients are clipped or the optimizer steps,
    for adapters that neither DDP nor FSDP takes care of. A missing gradient counts as zero, and is there afterwards, so
    that processes whose batches used different layers still agree; frozen factors are left out.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for layer in live_ranks.allocator.layers.values():
        for factor in FACTORS:
            parameter = getattr(layer, factor)
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for parameters in by_dtype.values():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = buffer.split([gradient.numel() for gradient in gradients])
        views = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        live_ranks.average(buffer, live_ranks.live_elements(parameters, views, buffer)).wait()
        torch._foreach_copy_(gradients, views)


def average_loss(loss: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of a 0-dim loss over the processes, detached, the same to the bit on all of them.

    For `BudgetAllocator.observe`: strategies and policies that act on a loss must see the same one on every process.
    """
    mean = loss.detach().clone().div_(dist.get_world_size(group))
    dist.all_reduce(mean, group=group)
    return mean
