"""Short trainings under an allocator, in one process or in several, that record what the allocator did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peftkernels.allocation import AdaLoraAllocator, Budget, BudgetAllocator
from peftkernels.allocation.layers.sharding import gather
from peftkernels.allocation.strategies import STRATEGIES
from peftkernels.distributed import LiveRanks, adapter_parameters, average_adapter_gradients, live_rank_hook
from peftkernels.nn import AdaLoRALinear

# Shared out evenly by two and by three processes: the mean of their losses is the batch's.
BATCH = 12
STEPS = 12
LAYERS = ("first", "second", "third")
# One rank leaves the second of two processes without a row of A and without a gate, 5 and 7 do not divide evenly.
RANKS = (5, 7, 1)
TOTAL = 6


class Model(nn.Module):
    """Three adapted layers of three shapes on frozen weights, and a head that trains."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        sizes = ((12, 20), (20, 9), (9, 11))
        for name, rank, (k, n) in zip(LAYERS, RANKS, sizes, strict=True):
            layer = AdaLoRALinear.from_linear(nn.Linear(k, n, bias=name != "third").to(dtype), rank, lora_alpha=8)
            nn.init.normal_(layer.lora_E, std=0.1)
            setattr(self, name, layer)
        self.head = nn.Linear(11, 4).to(self.first.lora_A.dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.first.weight.dtype
        x = torch.tanh(self.second(torch.tanh(self.first(x.to(dtype)))))
        return self.head(self.third(x).to(self.head.weight.dtype))


def build(dtype: torch.dtype = torch.float64) -> Model:
    """The same on every process."""
    torch.manual_seed(5)
    return Model(dtype)


def batch(step: int, process: int, processes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A process's part of the batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    own = slice(process * BATCH // processes, (process + 1) * BATCH // processes)
    return x[own].to(dtype), y[own].to(dtype)


@dataclass
class Record:
    """masks: states of all ranks after every step; norms: of all gradients before clipping; factors: at the end;
    sent: elements of every all-reduce of gradients, by step."""

    masks: list[list[int]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    factors: dict[str, Tensor] = field(default_factory=dict)
    sent: list[list[int]] = field(default_factory=list)


def wrapped(model: Model, how: str, **sharding: Any) -> nn.Module:
    if how == "one":
        return model
    if how in ("ddp", "hook"):
        return DistributedDataParallel(model)
    ignored = adapter_parameters(model) if how == "replicated" else set()
    for name in LAYERS:
        fully_shard(getattr(model, name), ignored_params=ignored, **sharding)
    return fully_shard(model, ignored_params=ignored, **sharding)


def allocator_for(model: nn.Module, strategy: str = "adalora", **settings: Any) -> BudgetAllocator:
    settings = {
        "total_step": STEPS,
        "budget": Budget(TOTAL),
        "tinit": 2,
        "tfinal": 4,
        "orth_reg_weight": 0.1,
    } | settings
    if strategy == "adalora":
        return AdaLoraAllocator(model, **settings)
    return BudgetAllocator(model, STRATEGIES[strategy](), **settings)


class Training:
    """A model, wrapped for `how`, with its optimizer and its allocator."""

    def __init__(
        self,
        how: str,
        process: int = 0,
        processes: int = 1,
        *,
        dtype: torch.dtype = torch.float64,
        closed_form: bool = False,
        clip: bool = True,
        strategy: str = "adalora",
        mesh_shape: tuple[int, int] | None = None,
        policy: MixedPrecisionPolicy | None = None,
        **settings: Any,
    ) -> None:
        self.how, self.process, self.processes = how, process, processes
        self.closed_form, self.clip = closed_form, clip
        self.inner = build(dtype)
        sharding: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
        if mesh_shape is not None:
            sharding["mesh"] = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "shards"))
        self.model = wrapped(self.inner, how, **sharding)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.allocator = allocator_for(self.inner, strategy, **settings)
        self.allocator.attach(self.optimizer)
        self.record = Record()
        self.live_ranks = LiveRanks(self.allocator) if how in ("hook", "replicated") else None
        if how == "hook":
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(self.live_ranks, live_rank_hook)

    def run(self, first: int, last: int, before_step: Callable[[int], None] = lambda step: None) -> Record:
        """Steps `first` to `last`, both included; before_step is called when the gradients are there."""
        for step in range(first, last + 1):
            x, y = batch(step, self.process, self.processes, self.inner.head.weight.dtype)
            loss = (self.model(x) - y).square().mean()
            if not self.closed_form:
                loss = loss + self.allocator.regularization()
            with SentElements() as sent:
                loss.backward()
                if self.how == "replicated":
                    assert self.live_ranks is not None
                    average_adapter_gradients(self.live_ranks)
            if self.closed_form:
                self.allocator.add_regularization_gradient()
            before_step(step)
            if self.clip:
                norm: Any = nn.utils.clip_grad_norm_([p for p in self.inner.parameters() if p.requires_grad], 0.5)
                self.record.norms.append(float(norm.full_tensor() if self.how == "fsdp2" else norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.record.masks.append(states(self.inner))
            self.record.sent.append(sent.elements)
        self.record.factors = whole_parameters(self.inner)
        return self.record


class SentElements:
    """The sizes of the tensors given to dist.all_reduce in the block."""

    def __enter__(self) -> SentElements:
        self.elements: list[int] = []
        self._original = dist.all_reduce

        def counting(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            self.elements.append(tensor.numel())
            return self._original(tensor, *arguments, **keywords)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def states(model: Model) -> list[int]:
    return [state for name in LAYERS for state in getattr(model, name).rank_state.tolist()]


def whole_parameters(model: Model) -> dict[str, Tensor]:
    """Copies of all parameters, whole."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = [p.detach().unsqueeze(1) if p.dim() == 1 else p.detach() for p in parameters]
    return {name: whole.clone() for name, whole in zip(names, gather(flat), strict=True)}


def run_whole(process: int, how: str, processes: int = 2, **settings: Any) -> Record:
    """A whole run, for `Processes.run`."""
    return Training(how, process, processes, **settings).run(1, STEPS)
