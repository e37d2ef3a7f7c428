"""HF peft's models on our kernels in two processes: DDP and FSDP2 give the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from processes import Processes
from support.peft_models import adapted, loss_of, relative_errors, tokens
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftkernels

ROWS = 4


def _batch() -> Tensor:
    return tokens(rows=ROWS)


def gradients_of_a_share(process: int, how: str, kind: str) -> tuple[dict[str, Tensor], int, int]:
    """Of the mean loss over all processes, by parameter; how many calls were served and not."""
    model = adapted(kind)
    peftkernels.apply_to_peft(model, strict=True)
    wrapped: Any = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    ids = _batch().chunk(dist.get_world_size())[process]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    counted = peftkernels.stats(model)
    return whole, counted.served, counted.fell_back


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(pair: Processes, how: str, kind: str) -> None:
    stock = adapted(kind)
    loss_of(stock, _batch()).backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    for found, served, fell_back in pair.run(gradients_of_a_share, how, kind):
        assert (served, fell_back) == (14, 0)
        assert max(relative_errors(found, expected).values()) <= 1e-5
