"""The masks of all layers: which ranks are kept, which layers are frozen, and the writing of both into the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftkernels.allocation.layers.adapted import AdaptedLayers
from peftkernels.allocation.layers.gated import FACTORS, GatedLayer
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import FactorLayout
from peftkernels.ops.rank_plan import RankPlan, RankState


class RankMasks:
    """Which ranks are kept, on the layers' device, and the only place that writes gates and rank plans.

    All ranks are ACTIVE from the moment the allocator is made. After a mask, masked ranks are PROBE until the next
    optimizer step, which moves their gates away from zero; between masks (deltaT > 1) every rank is ACTIVE. Ranks of a
    frozen layer are DEAD, or ACTIVE where it was to keep them.

    Attributes:
        keep: bool (Σ r,), layers in model order: the last mask.
        frozen: Names of the layers that no longer train.
        frozen_ranks: bool (Σ r,): the ranks of these.
        all_active: True if the plans say ACTIVE everywhere (but in frozen layers), as between two masks.
        changes: How often the states of ranks may have changed: while it stays the same, states that were read from the
            device are up to date (where the allocator is not captured in a graph).
        layers: The layers by name, with whole factors.
        own: The same layers with the parameters that the optimizer trains: shards, where processes share them out.
        ranks: The rank of every layer by name.
        layout: Where the factors lie for the kernels.
        kernels: What computes on the layers' device.
    """

    def __init__(self, layers: AdaptedLayers, kernels: AllocationKernels) -> None:
        self._layers = layers
        self.layers: Mapping[str, GatedLayer] = dict(layers.whole)
        self.own = layers.own
        self.ranks = layers.ranks
        self.layout = FactorLayout.of([(r, k, n) for r, n, k in layers.shapes().values()])
        self.kernels = kernels
        self.keep = torch.ones(self.layout.total_rank, dtype=torch.bool, device=layers.device)
        self.frozen: tuple[str, ...] = ()
        self.frozen_ranks = torch.zeros_like(self.keep)
        self.changes = 0
        self._masked: RankState | None = None
        # Which factors were trained before their layer was frozen, to be trained again if it no longer is.
        self._trained: dict[str, list[str]] = {}
        # Layers may come with states of an earlier run.
        self.write_all_active()

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.keep.device

    def follow(self, device: torch.device, kernels: AllocationKernels) -> None:
        """Compute on this device with these kernels from now on, since the layers have moved there."""
        self.keep = self.keep.to(device)
        self.frozen_ranks = self.frozen_ranks.to(device)
        self.kernels = kernels

    def gates(self) -> list[Tensor]:
        """Return lora_E of every layer."""
        return self._layers.factors("lora_E")

    def fresh_gates(self) -> list[Tensor]:
        """Return lora_E of every layer as it is now; collective where the factors are sharded over processes."""
        self._layers.forget()
        return self.gates()

    def plans(self) -> list[RankPlan]:
        """Return the rank plan of every layer, over the layer's own tensors."""
        return [layer.rank_plan for layer in self.layers.values()]

    def pattern(self) -> dict[str, list[bool]]:
        """Return the last mask by layer, read from the device once."""
        parts = self.keep.cpu().split(list(self.ranks.values()))
        return {name: part.tolist() for name, part in zip(self.ranks, parts, strict=True)}

    def hold(self, scores: Tensor, held: Tensor) -> Tensor:
        """Return the scores with ranks that are held, bool (Σ r,), where they cannot change sides."""
        return torch.where(held, torch.where(self.keep, torch.inf, -torch.inf).to(scores.dtype), scores)

    def take(self, keep: Tensor) -> None:
        """Take over the ranks that a decision keeps."""
        self.keep.copy_(keep)
        self.changes += 1

    def restore(self, keep: Tensor, frozen: Sequence[str]) -> None:
        """Take over a saved mask and the layers that were frozen."""
        self.freeze(frozen)
        self.keep.copy_(keep)
        self.changes += 1

    def check_writable(self) -> None:
        """Raise RuntimeError where the layers' own gates cannot be written now: see `ShardedFactors`."""
        self._layers.check_writable()

    def write_masked(self, masked: RankState, mask_now: Tensor | None = None) -> None:
        """Gates outside the mask become zero and their ranks `masked`; see `AllocationKernels.apply` for mask_now."""
        self.kernels.apply(self.layout, self.keep, self.gates(), self.plans(), int(masked), mask_now)
        self._write_frozen()
        self._written(masked)

    def write_all_active(self) -> None:
        """Every rank becomes ACTIVE; gates stay as they are."""
        everything = torch.ones_like(self.keep)
        self.kernels.apply(self.layout, everything, self.gates(), self.plans(), int(RankState.PROBE))
        self._write_frozen()
        self._written(None)

    def freeze(self, names: Sequence[str]) -> None:
        """Make these layers the frozen ones: no factor of theirs requires grad. Layers that were frozen and are not
        among them train again."""
        for name, layer in self.own.items():
            if name in names and name not in self.frozen:
                self._trained[name] = [factor for factor in FACTORS if getattr(layer, factor).requires_grad]
                for factor in self._trained[name]:
                    parameter = getattr(layer, factor)
                    parameter.requires_grad_(False)
                    # An optimizer leaves a parameter without a gradient alone: no weight decay, no momentum.
                    parameter.grad = None
            elif name in self.frozen and name not in names:
                for factor in self._trained.pop(name):
                    getattr(layer, factor).requires_grad_(True)
        self.frozen = tuple(names)
        self.changes += 1
        parts = [torch.full((rank,), name in names) for name, rank in self.ranks.items()]
        self.frozen_ranks.copy_(torch.cat(parts))

    def drop(self, name: str) -> None:
        """Keep no rank of a layer."""
        self.by_layer()[list(self.ranks).index(name)].zero_()
        self.changes += 1

    def living(self, *, dead: bool) -> tuple[Tensor, ...]:
        """Return for each layer which of its ranks are not DEAD, bool (r,); with `dead` every masked rank is."""
        if dead:
            return self.by_layer()
        parts = zip(self.ranks, self.by_layer(), strict=True)
        return tuple(keep if name in self.frozen else torch.ones_like(keep) for name, keep in parts)

    def by_layer(self) -> tuple[Tensor, ...]:
        """Return the mask of each layer, bool (r,)."""
        return self.keep.split(list(self.ranks.values()))

    def _written(self, masked: RankState | None) -> None:
        """States and gates of all layers are written; masked: None for all ranks ACTIVE."""
        self._layers.store_gates()
        if masked is not self._masked:
            self._masked = masked
            self.changes += 1
        self.all_active = masked is None

    def _write_frozen(self) -> None:
        if not self.frozen:
            return
        for (name, layer), keep in zip(self.layers.items(), self.by_layer(), strict=True):
            if name in self.frozen:
                states = torch.where(keep, int(RankState.ACTIVE), int(RankState.DEAD)).to(torch.uint8)
                layer.rank_plan.update_(states)
                with torch.no_grad():
                    layer.lora_E.mul_(keep.unsqueeze(1))
