"""The layers of one allocator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftkernels.allocation.layers.gated import FACTORS, GatedLayer, factors_of
from peftkernels.allocation.layers.sharding import find_shards


class AdaptedLayers:
    """Gated layers by name, with whole factors and with the parameters that the optimizer trains.

    The two are the same but where processes share the factors out, as FSDP2 does it: whole factors are gathered then
    when they are looked at, and kept until `forget`.

    Attributes:
        modules: The layers as they were found.
        whole: The layers with whole factors.
        own: The layers with the parameters that the optimizer trains: this process's shards of them.

    Raises:
        ValueError: Where a factor is sharded in another way than `fully_shard` does it; names the factor.
    """

    def __init__(self, modules: Mapping[str, GatedLayer]) -> None:
        self.modules = modules
        self._shards = find_shards(modules)
        self.whole: Mapping[str, GatedLayer] = modules if self._shards is None else self._shards.layers
        self.own: Mapping[str, GatedLayer] = modules if self._shards is None else self._shards.own

    @property
    def sharded(self) -> bool:
        """True if the factors are sharded over processes."""
        return self._shards is not None

    @property
    def device(self) -> torch.device:
        """The device of all layers.

        Raises:
            ValueError: Where they are on several.
        """
        gates = factors_of(self.own.values(), "lora_E")
        devices = {gate.device: name for name, gate in zip(self.own, gates, strict=True)}
        if len(devices) > 1:
            found = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
            raise ValueError(f"layers: found {found}, expected all of them on one device")
        return next(iter(devices))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics over the layers: float32, or float64 where a factor is."""
        dtype = torch.float32
        # Asking a whole factor for its dtype would gather it.
        for layer in self.own.values():
            for factor in FACTORS:
                dtype = torch.promote_types(dtype, getattr(layer, factor).dtype)
        return dtype

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer by name."""
        return {name: layer.lora_E.shape[0] for name, layer in self.own.items()}

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return (r, N, K) of every layer by name."""
        return {
            name: (layer.lora_E.shape[0], layer.lora_B.shape[0], layer.lora_A.shape[1])
            for name, layer in self.own.items()
        }

    def factors(self, factor: str) -> list[Tensor]:
        """Return "lora_A", "lora_B" or "lora_E" of every layer, whole."""
        return factors_of(self.whole.values(), factor)

    def differentiable(self, factor: str) -> list[Tensor]:
        """Return `factor` of every layer, whole, with gradients that flow to the parameters that are trained."""
        return self.factors(factor) if self._shards is None else self._shards.differentiable(factor)

    def forget(self) -> None:
        """Gather whole factors anew when they are looked at next; the parameters or gradients may have changed."""
        if self._shards is not None:
            self._shards.forget()

    def store_gates(self) -> None:
        """Write whole gates back into the parameters that are trained."""
        if self._shards is not None:
            self._shards.store_gates()

    def store_gradients(self, *factors: str) -> None:
        """Write whole gradients of these factors back to the parameters that are trained."""
        if self._shards is not None:
            for factor in factors:
                self._shards.store_gradients(factor)

    def check_writable(self) -> None:
        """Raise RuntimeError where gates cannot be written now: see `ShardedFactors`."""
        if self._shards is not None:
            self._shards.check_writable()
