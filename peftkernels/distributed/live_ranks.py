"""Gradients of the ranks that take part, and no others: what data-parallel processes need to send each other."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.layers.gated import FACTORS
from peftkernels.distributed.agreement import check_agreement
from peftkernels.ops.rank_plan import RankState


class LiveRanks:
    """Which elements of the factors' gradients depend on a process's data, and so must be averaged.

    - Of an ACTIVE rank its row of A, its column of B and its gate.
    - Of a PROBE rank its gate.
    - Of a DEAD rank nothing.

    The rest is zero on every process, or what an orthogonality term puts there, which is the same on every process
    because it depends on the parameters alone; averaging it would change nothing.

    The states of the ranks are read from the device when a decision may have changed them, not in every step. Then all
    processes compare their masks before anything is packed: buffers of different meaning would be added up otherwise.
    RuntimeError on every process says where they differ.

    Args:
        allocator: each process's own.
        group: the processes, all of them by default.

    Raises:
        ValueError: an allocator with capturable=True, whose masks the host does not know, or with sharded layers, whose
            gradients FSDP reduces.
    """

    def __init__(self, allocator: BudgetAllocator, group: dist.ProcessGroup | None = None) -> None:
        if allocator.settings.capturable:
            raise ValueError("allocator: found capturable=True, expected False: masks are read by the host here")
        if allocator.sharded:
            raise ValueError("allocator: found layers that are sharded over processes, expected replicated ones")
        self.allocator = allocator
        self._group = group
        self._changes = -1
        self._states: dict[str, Tensor] = {}
        self._live: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], Tensor | None]] = {}

    def live_elements(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffer: Tensor) -> Tensor | None:
        """Positions in `buffer` to average. Collective when the masks may have changed.

        Args:
            parameters: those that are no factor of the allocator's layers are averaged as a whole.
            gradients: views of `buffer`, one for each of the parameters.
            buffer: flat.

        Returns:
            int64 in ascending order; None for all of them.
        """
        self._follow_masks()
        start = buffer.storage_offset()
        # Addresses only find the entry: they may be those of other parameters by now.
        key = (*map(id, parameters), *(int(view.storage_offset() - start) for view in gradients))
        found = self._live.get(key)
        if found is None or any(one() is not parameter for one, parameter in zip(found[0], parameters, strict=True)):
            live = self._positions(parameters, gradients, buffer)
            found = self._live[key] = [weakref.ref(parameter) for parameter in parameters], live
        return found[1]

    def average(self, buffer: Tensor, live: Tensor | None) -> torch.futures.Future[Tensor]:
        """Start averaging those elements of `buffer` over the processes; gives `buffer` when they are in place."""
        packed = buffer if live is None else buffer.index_select(0, live)
        if packed.numel() == 0:
            # A future of a CUDA tensor needs its device.
            done: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[buffer.device] if buffer.device.type == "cuda" else None
            )
            done.set_result(buffer)
            return done
        packed.div_(dist.get_world_size(self._group))
        work = dist.all_reduce(packed, group=self._group, async_op=True)
        assert work is not None

        def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            averaged = future.value()[0]
            return averaged if live is None else buffer.index_copy_(0, live, averaged)

        waiting: torch.futures.Future[Tensor] = work.get_future().then(unpack)
        return waiting

    def _follow_masks(self) -> None:
        masks = self.allocator.masks
        if masks.changes == self._changes:
            return
        check_agreement(self.allocator, self._group, kinds=("mask",))
        states = torch.cat([plan.state for plan in masks.plans()]).cpu().split(list(masks.ranks.values()))
        self._states = dict(zip(masks.ranks, states, strict=True))
        self._live.clear()
        self._changes = masks.changes

    def _positions(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffer: Tensor) -> Tensor | None:
        owners = {
            id(getattr(layer, factor)): (name, factor)
            for name, layer in self.allocator.layers.items()
            for factor in FACTORS
        }
        taking_part = torch.ones(buffer.numel(), dtype=torch.bool)
        for parameter, view in zip(parameters, gradients, strict=True):
            if id(parameter) not in owners:
                continue
            name, factor = owners[id(parameter)]
            state = self._states[name]
            needed = state != int(RankState.DEAD) if factor == "lora_E" else state == int(RankState.ACTIVE)
            own = taking_part.as_strided(view.shape, view.stride(), view.storage_offset() - buffer.storage_offset())
            own.copy_(needed.unsqueeze(0 if factor == "lora_B" else 1).expand(view.shape))
        if bool(taking_part.all()):
            return None
        return torch.nonzero(taking_part).flatten().to(buffer.device)
