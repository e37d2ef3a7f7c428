"""Layers whose factors are sharded over processes (FSDP2), seen as layers with whole factors.

`fully_shard` leaves every process one block of rows of each parameter, a DTensor. Statistics of a rank need all of its
row of A, its column of B and its gate, so an allocator gathers parameters and gradients, decides on every process
alike, and writes gates back through each process's own block.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peftkernels.allocation.layers.gated import FACTORS, GatedLayer
from peftkernels.ops.rank_plan import RankPlan


class OwnLayer:
    """A layer whose lora_A, lora_B and lora_E are the parameters that the optimizer trains: this process's shards.

    FSDP puts whole factors in the place of their shards from a forward pass to the end of its backward pass, and after
    a forward pass without one; the shards hold the values all the same, so they are remembered here.
    """

    def __init__(self, module: GatedLayer) -> None:
        self._module = module
        self._remembered: dict[str, Any] = {}

    @property
    def lora_A(self) -> Tensor:
        return self.parameter("lora_A")

    @property
    def lora_B(self) -> Tensor:
        return self.parameter("lora_B")

    @property
    def lora_E(self) -> Tensor:
        return self.parameter("lora_E")

    @property
    def rank_plan(self) -> RankPlan:
        """The layer's own: buffers are not sharded."""
        return self._module.rank_plan

    def parameter(self, factor: str) -> Any:
        """A DTensor, or a plain parameter where `fully_shard` was told to ignore it."""
        found = getattr(self._module, factor)
        if is_sharded(found) or factor not in self._remembered:
            self._remembered[factor] = found
        return self._remembered[factor]

    def gathered(self) -> bool:
        """Return True if FSDP has put whole factors in the place of shards at present."""
        return any(getattr(self._module, factor) is not self.parameter(factor) for factor in FACTORS)


class WholeLayer:
    """A layer whose lora_A, lora_B and lora_E are whole tensors with whole gradients in `.grad`.

    They are copies, the same on every process; writing to them reaches the layer through `ShardedFactors.store_gates`
    and `store_gradients` only.
    """

    def __init__(self, factors: ShardedFactors, index: int, module: GatedLayer) -> None:
        self._factors = factors
        self._index = index
        self._module = module

    @property
    def lora_A(self) -> Tensor:
        return self._factors.whole("lora_A")[self._index]

    @property
    def lora_B(self) -> Tensor:
        return self._factors.whole("lora_B")[self._index]

    @property
    def lora_E(self) -> Tensor:
        return self._factors.whole("lora_E")[self._index]

    @property
    def rank_plan(self) -> RankPlan:
        """The layer's own: buffers are not sharded."""
        return self._module.rank_plan


class ShardedFactors:
    """The factors of layers and their gradients, gathered from all processes when they are looked at.

    What was gathered is kept until `forget`. Every process must look at the same factors in the same order, which holds
    where all run the same allocator; A, B and E of all layers take one collective each.

    Attributes:
        own: The layers with the parameters that the optimizer trains.
        layers: The layers with whole factors.
    """

    def __init__(self, modules: Mapping[str, GatedLayer]) -> None:
        self.own = {name: OwnLayer(module) for name, module in modules.items()}
        self.layers = {name: WholeLayer(self, index, module) for index, (name, module) in enumerate(modules.items())}
        self._whole: dict[str, list[Tensor]] = {}
        for name, layer in self.own.items():
            for factor in FACTORS:
                parameter = layer.parameter(factor)
                if is_sharded(parameter):
                    _shard_dimension(parameter, f"layers[{name!r}].{factor}")

    def forget(self) -> None:
        """Gather anew from now on: parameters or gradients may have changed."""
        self._whole.clear()

    @torch.no_grad()
    def whole(self, factor: str) -> list[Tensor]:
        """`factor` of every layer, with its gradient in `.grad`."""
        if factor not in self._whole:
            parameters = self._parameters(factor)
            trained = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
            gathered = gather([*parameters, *(parameters[index].grad for index in trained)])
            copies, gradients = gathered[: len(parameters)], gathered[len(parameters) :]
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.requires_grad_(parameter.requires_grad)
            for index, gradient in zip(trained, gradients, strict=True):
                copies[index].grad = gradient
            self._whole[factor] = copies
        return self._whole[factor]

    def differentiable(self, factor: str) -> list[Tensor]:
        """`factor` of every layer, whole, with gradients that flow back into the shards.

        Every process must differentiate the same function of them: each keeps its block of the gradient as it is.
        """
        return list(_Gather.apply(*self._parameters(factor)))

    @torch.no_grad()
    def store_gates(self) -> None:
        """Write the whole gates back into the layers: each process its own block."""
        for parameter, gate in zip(self._parameters("lora_E"), self.whole("lora_E"), strict=True):
            if is_sharded(parameter):
                local_part(parameter).copy_(_own_block(gate, parameter))

    @torch.no_grad()
    def store_gradients(self, factor: str) -> None:
        """Write the whole gradients of `factor` back into the parameters' `.grad`: each process its own block."""
        for parameter, whole in zip(self._parameters(factor), self.whole(factor), strict=True):
            if not is_sharded(parameter) or whole.grad is None:
                continue
            block = _own_block(whole.grad, parameter)
            if parameter.grad is None:
                parameter.grad = _sharded_like(block.clone(), parameter)
            else:
                local_part(parameter.grad).copy_(block)

    def check_writable(self) -> None:
        """Raise RuntimeError, naming one, where layers hold whole factors in the place of shards.

        Written to either, the other would win later.
        """
        for name, layer in self.own.items():
            if layer.gathered():
                raise RuntimeError(
                    f"layers[{name!r}]: found whole factors in the place of shards, as FSDP leaves them after a "
                    "forward pass without a backward pass; call reshard() on the module given to fully_shard first"
                )

    def _parameters(self, factor: str) -> list[Any]:
        return [layer.parameter(factor) for layer in self.own.values()]


def find_shards(layers: Mapping[str, GatedLayer]) -> ShardedFactors | None:
    """Return what gathers the layers' factors where any is sharded, else None.

    Raises:
        ValueError: Naming the factor, where one is sharded in another way than `fully_shard` does it.
    """
    sharded = any(is_sharded(getattr(layer, factor)) for layer in layers.values() for factor in FACTORS)
    return ShardedFactors(layers) if sharded else None


def check_not_sharded_since(layers: Mapping[str, GatedLayer]) -> None:
    """Raise RuntimeError, naming one, where layers have sharded factors, which were whole when they were looked up."""
    for name, layer in layers.items():
        if any(is_sharded(getattr(layer, factor)) for factor in FACTORS):
            raise RuntimeError(
                f"layers[{name!r}]: found factors that were sharded after the allocator was made; call fully_shard "
                "first, then make the optimizer and the allocator"
            )


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its block of a sharded one, all of a plain one, sharing its memory."""
    if not is_sharded(tensor):
        return tensor.detach()
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Return True if `tensor` is a DTensor; does not import what makes them, which takes longer than the package."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensors: Sequence[Any]) -> list[Tensor]:
    """The whole of every tensor: one all-gather for all sharded ones of a mesh and dtype. Plain ones come as they are.

    Rows are laid out as `torch.chunk` cuts them, so with w processes block i of n rows begins at row i·⌈n/w⌉ and the
    last blocks may be short or empty; blocks are padded for the transfer.
    """
    whole: list[Tensor] = list(tensors)
    together: dict[tuple[Any, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            together.setdefault((tensor.device_mesh, tensor.dtype), []).append(index)
    for (mesh, dtype), indices in together.items():
        dimension = _shard_dimension(tensors[indices[0]])
        processes = mesh.size(dimension)
        rows = [-(-tensors[index].shape[0] // processes) for index in indices]
        lengths = [count * tensors[index].shape[1] for count, index in zip(rows, indices, strict=True)]
        blocks = [local_part(tensors[index]) for index in indices]
        packed = torch.zeros(sum(lengths), dtype=dtype, device=blocks[0].device)
        for part, block in zip(packed.split(lengths), blocks, strict=True):
            part[: block.numel()] = block.reshape(-1)
        received = torch.empty(processes * packed.numel(), dtype=dtype, device=packed.device)
        all_gather(received, packed, mesh.get_group(dimension))
        parts = received.view(processes, -1).split(lengths, dim=1)
        for index, part in zip(indices, parts, strict=True):
            n, columns = tensors[index].shape
            whole[index] = part.reshape(-1, columns)[:n].contiguous()
    return whole


def all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup | None) -> None:
    """Every process's `sent`, one after the other, into `received`; both flat."""
    # torch 2.13 gave the collective this name; 2.11 and 2.12 know the old one only.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(received, sent, group=group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Any) -> tuple[Tensor, ...]:
        ctx.parameters = parameters
        return tuple(
            whole if is_sharded(parameter) else whole.view_as(whole)
            for whole, parameter in zip(gather(parameters), parameters, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return tuple(
            _sharded_like(_own_block(gradient, parameter).clone(), parameter)
            if gradient is not None and is_sharded(parameter)
            else gradient
            for gradient, parameter in zip(gradients, ctx.parameters, strict=True)
        )


def _shard_dimension(tensor: Any, name: str = "factor") -> int:
    """The dimension of the mesh over which the rows of `tensor` are sharded; the others hold copies."""
    from torch.distributed.tensor import Replicate, Shard

    sharded = [index for index, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    if len(sharded) != 1 or tensor.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"{name}: found the placements {tensor.placements}, expected rows sharded over one dimension of the mesh "
            "and copies over the others, as fully_shard makes them"
        )
    return sharded[0]


def _own_block(whole: Tensor, like: Any) -> Tensor:
    """The rows of `whole` that this process holds of `like`."""
    dimension = _shard_dimension(like)
    mesh = like.device_mesh
    start = mesh.get_local_rank(dimension) * -(-like.shape[0] // mesh.size(dimension))
    return whole[start : start + local_part(like).shape[0]]


def _sharded_like(block: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    sharded: Tensor = DTensor.from_local(
        block, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded
