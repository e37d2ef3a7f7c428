"""What an allocator consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftkernels.allocation.layers.adapted import AdaptedLayers
from peftkernels.allocation.layers.gated import find_gated_layers
from peftkernels.allocation.layers.ownership import check_free
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.device_schedule import DeviceSchedule
from peftkernels.allocation.run.hook import IdleWatch
from peftkernels.allocation.run.masks import RankMasks
from peftkernels.allocation.run.progress import RunProgress
from peftkernels.allocation.run.settings import AllocatorSettings
from peftkernels.allocation.run.watchers import Watchers
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy
from peftkernels.backends.registry import kernels_for
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.rank_plan import RankState


@dataclass(frozen=True)
class RunParts:
    """The parts of one allocator. Each keeps its own state; the methods here are what concerns several of them.

    Attributes:
        settings: What the allocator was given.
        impl: Which implementation of the kernels was asked for.
        strategy: Scores the ranks.
        layers: The layers whose ranks are decided.
        statistics: What the strategy looks at.
        masks: Which ranks are kept.
        progress: What has been counted and decided.
        watchers: Observers and warnings.
        idle: Notices when the allocator is not stepped.
    """

    settings: AllocatorSettings
    impl: str
    strategy: Strategy
    layers: AdaptedLayers
    statistics: Statistics
    masks: RankMasks
    progress: RunProgress
    watchers: Watchers
    idle: IdleWatch

    @classmethod
    def make(
        cls,
        model: nn.Module | Mapping[str, Any],
        strategy: Strategy,
        settings: AllocatorSettings,
        costs: Mapping[str, float] | None,
        impl: str,
    ) -> RunParts:
        """Make the parts of a run that begins: all ranks ACTIVE, nothing counted or decided.

        Raises:
            TypeError: Naming the argument found wrong.
            ValueError: Likewise, and for layers that have an allocator already.
        """
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy: found {type(strategy).__name__}, expected a Strategy")
        if settings.capturable and not strategy.capturable:
            raise ValueError(f"capturable: found True, but the strategy {strategy.name!r} decides on the host")
        found = find_gated_layers(model)
        check_free(found)
        layers = AdaptedLayers(found)
        if settings.capturable and layers.sharded:
            raise ValueError("capturable: found True for layers that are sharded over processes, expected False")
        shares = settings.share_out(layers.shapes(), costs)
        device = layers.device
        kernels = kernels_for(device, layers.dtype, impl)
        statistics = Statistics(layers, kernels, shares, exact=settings.exact_budget)
        masks = RankMasks(layers, kernels)
        strategy.begin(statistics)
        if settings.capturable:
            statistics.prepare()
        schedule = DeviceSchedule(settings, shares, device) if settings.capturable else None
        watchers = Watchers()
        progress = RunProgress(shares, device, watchers, schedule)
        idle = IdleWatch(layers.own)
        layers.forget()
        return cls(settings, impl, strategy, layers, statistics, masks, progress, watchers, idle)

    @property
    def all_active(self) -> bool:
        """True if every rank trains; reads the device where the step is captured."""
        schedule = self.progress.schedule
        return self.masks.all_active if schedule is None else not bool(schedule.masks())

    def write_states(self, *, mask: bool) -> None:
        """Write the states of all ranks, and the gates of masked ones; mask=False makes every rank ACTIVE."""
        if mask:
            dead = self.progress.released and self.settings.compact
            self.masks.write_masked(RankState.DEAD if dead else RankState.PROBE)
        else:
            self.masks.write_all_active()

    def freeze(self, name: str, drop: bool) -> bool:
        """Take a layer out of the fine-tuning, as `BudgetAllocator.freeze` says; returns False if it was out already.

        Raises:
            ValueError: For an unknown layer.
        """
        masks = self.masks
        if name not in masks.ranks:
            names = list(masks.ranks)
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise ValueError(f"name: found {name!r}, expected one of {shown}")
        if name in masks.frozen:
            return False
        masks.check_writable()
        self.layers.forget()
        masks.freeze((*masks.frozen, name))
        if drop:
            masks.drop(name)
        self.write_states(mask=not self.all_active)
        self.statistics.forget()
        return True

    def check_on_host(self, argument: str, what: str) -> None:
        """Raise ValueError where a captured step does nothing on the host for `argument`."""
        if self.progress.schedule is not None:
            raise ValueError(
                f"{argument}: a captured step {what} the host; expected an allocator with capturable=False"
            )

    def living(self) -> tuple[Tensor, ...] | None:
        """Return the ranks of each layer that the orthogonality term covers, bool (r,), or None for all."""
        compact = self.progress.released and self.settings.compact
        return self.masks.living(dead=compact) if compact or self.masks.frozen else None

    def current_kernels(self) -> AllocationKernels:
        """Return the allocator's kernels, which keep their tables, for the device where the layers are now."""
        if self.progress.schedule is None:
            self.follow_device()
        return self.statistics.kernels

    def follow_device(self) -> None:
        """Move everything to where the layers are now, which may have been moved since the last step."""
        device = self.layers.device
        if self.masks.device == device:
            return
        kernels = kernels_for(device, self.statistics.dtype, self.impl)
        self.statistics.follow(kernels)
        self.masks.follow(device, kernels)
        self.progress.follow(device)
        if not self.progress.released:
            tensors = {name: tensor.to(device) for name, tensor in self.strategy.tensors().items()}
            self.strategy.begin(self.statistics)
            self.strategy.load(tensors, self.statistics)

    def restore(self, facts: Mapping[str, Any], keep: Tensor, decision: Decision | None, losses: Tensor) -> None:
        """Become what a checked state says: everything but the strategy, whose own state comes before."""
        self.follow_device()
        self.statistics.restore_losses(losses)
        self.progress.restore(facts, decision)
        self.layers.forget()
        self.masks.restore(keep, facts["frozen"])
        self.write_states(mask=not facts["all_active"])
        self.idle.reset()
