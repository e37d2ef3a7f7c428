"""Running an allocator after every optimizer step, and noticing when it is not run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peftkernels.allocation.layers.gated import FACTORS, GatedLayer, factors_of


def run_after_step(
    optimizer: Optimizer,
    run: Callable[[Optimizer], None],
    layers: Mapping[str, GatedLayer],
    frozen: Collection[str] = (),
) -> tuple[RemovableHandle, Optimizer]:
    """Call `run(optimizer)` after every `optimizer.step()` until the returned handle is removed.

    A wrapper that never initialised itself as an Optimizer and keeps the one that steps in `.optimizer`, as
    accelerate's does, is looked through: a hook on the wrapper would never run.

    Args:
        optimizer: What trains the layers.
        run: What is called.
        layers: Layers whose adapter factors it must train.
        frozen: Names of layers whose factors may be missing.

    Returns:
        The handle, and the optimizer that steps.

    Raises:
        TypeError: For anything but an optimizer.
        ValueError: Where it does not train every adapter factor of the layers; names those it misses.
    """
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and "_optimizer_step_post_hooks" not in vars(inner):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer: found {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    trained = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    missing = [
        f"{name}.{factor}"
        for name, layer in layers.items()
        if name not in frozen
        for factor in FACTORS
        if id(getattr(layer, factor)) not in trained
    ]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise ValueError(
            f"optimizer: found param groups without {shown}, expected every lora_A, lora_B and lora_E of the layers"
        )

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        run(inner)

    return inner.register_step_post_hook(after_step), inner


def found_overflow(optimizer: Optimizer) -> Tensor | None:
    """Return what a GradScaler found in this step's gradients, not zero for an overflow; None without a scaler.

    With most optimizers a scaler does not call `step` after an overflow. Fused ones are called all the same and leave
    the parameters alone; the scaler tells them so through this attribute, for the time of the call.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found


class IdleWatch:
    """Notices that the gates are being trained while the allocator is not stepped.

    A gate's version counter moves whenever it is written in place. Loading a checkpoint moves it too, as does swapping
    averaged weights in and out for an evaluation, so two movements between two allocator steps prove nothing; three do.
    """

    def __init__(self, layers: Mapping[str, GatedLayer]) -> None:
        self._layers = list(layers.values())
        self.reset()

    def reset(self) -> None:
        """The allocator has just run, or taken over a saved state."""
        self._versions = self._read()
        self._movements = 0

    def idle(self) -> bool:
        """Look again; returns True once the gates have moved between two looks for the third time since `reset`."""
        versions = self._read()
        if versions != self._versions:
            self._versions = versions
            self._movements += 1
        return self._movements >= 3

    def warning(self, attached: bool) -> str:
        """Return what to say when `idle`."""
        if attached:
            return (
                "the gates lora_E are being trained but the optimizer the allocator is attached to is not stepped: "
                "call detach() and attach the one that is"
            )
        return (
            "the gates lora_E are being trained but the allocator is not stepped, so no rank is ever masked: call "
            "attach(optimizer) once, or step() after every optimizer step"
        )

    def _read(self) -> list[int]:
        return [gate._version for gate in factors_of(self._layers, "lora_E")]
