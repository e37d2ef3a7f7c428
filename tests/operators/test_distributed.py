"""DistributedDataParallel and FSDP2's per-parameter sharding over two processes: the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftkernels.backends import registry

PROGRAM = """
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from support.cases import make_call, run
from peftkernels import lora_linear

NAMES = ("lora_A", "lora_B", "gate")


class Layer(nn.Module):
    def __init__(self, call, impl):
        super().__init__()
        self.call, self.impl = call, impl
        self.weight = nn.Parameter(call.weight.clone(), requires_grad=False)
        for name in NAMES:
            setattr(self, name, nn.Parameter(getattr(call, name).clone()))

    def forward(self, x):
        keywords = {**self.call.optional, "bias": None, "gate": self.gate}
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, impl=self.impl, **keywords)


def check(rank, how, impl):
    whole = make_call(3, leading=(8,), n=12, k=10, r=4, plan=True, bias=False)
    mine = slice(4 * rank, 4 * rank + 4)
    layer = Layer(whole, impl)
    model = DistributedDataParallel(layer) if how == "ddp" else fully_shard(layer)
    for _ in range(2):
        model.zero_grad()
        model(whole.x[mine]).backward(whole.grad_y[mine])
    expected = run(whole, impl, NAMES).gradients
    for name in NAMES:
        gradient = getattr(layer, name).grad
        gradient = gradient.full_tensor() if how == "fsdp2" else gradient
        torch.testing.assert_close(2 * gradient, expected[name], rtol=1e-5, atol=1e-5)
    print(how, impl, "agrees", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    process = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=process, world_size=2)
    for impl in sys.argv[4].split(","):
        for how in ("ddp", "fsdp2"):
            check(process, how, impl)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_sharded_training(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    names = [name for name in ("eager", "cpu") if registry.backend_status()[name] is None]
    tests, meeting = str(request.config.rootpath / "tests"), str(tmp_path / "meeting")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tests, str(rank), meeting, ",".join(names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
            assert out.splitlines() == [f"{how} {name} agrees" for name in names for how in ("ddp", "fsdp2")]
    finally:
        for process in processes:
            process.kill()
