"""AdaLoRA's learning rate and alpha where LoRA's are known: docs/learning-rate-and-scale.md has the derivation."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The learning rate's share of the step from LoRA to AdaLoRA; the scale takes the rest. Measured: 5 and 3.
LR_MULTIPLIER = 5.0


@dataclass(frozen=True)
class AdaLoraRates:
    """What AdaLoRA is trained with.

    Attributes:
        lr: Peak learning rate of A, B and E.
        lora_alpha: The layers' lora_alpha.
    """

    lr: float
    lora_alpha: float


def from_lora(
    *,
    lr: float,
    lora_alpha: float,
    r: int,
    init_r: int,
    out_features: int,
    lr_multiplier: float = LR_MULTIPLIER,
) -> AdaLoraRates:
    """Return AdaLoRA's settings under which Adam moves ‖ΔW‖_F as far a step as with these settings of LoRA.

    A step of Adam moves every entry by about lr. For LoRA that is lr·(lora_alpha/r)·√(r·N/3) of ‖ΔW‖_F, whatever K;
    for AdaLoRA, whose orthogonality term gives the factors rows of norm 1, lr·(lora_alpha/init_r)·√init_r. Equal with

        lr' = lr_multiplier·lr,   lora_alpha' = init_r · (lora_alpha/r) · √(r·N/(3·init_r)) / lr_multiplier

    Gates alone would need no other learning rate; A and B, which start in random directions, do.

    Args:
        lr: LoRA's learning rate that works.
        lora_alpha: LoRA's alpha that works with it; its scale is lora_alpha/r.
        r: LoRA's rank that works with them.
        init_r: AdaLoRA's rank at the start.
        out_features: N, the typical width of the adapted layers' outputs.
        lr_multiplier: AdaLoRA's learning rate over LoRA's.

    Raises:
        TypeError: Naming the argument, what was found and what was expected.
        ValueError: Likewise.
    """
    for name, value in (("r", r), ("init_r", init_r), ("out_features", out_features)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    for name, number in (("lr", lr), ("lora_alpha", lora_alpha), ("lr_multiplier", lr_multiplier)):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{name}: found {number!r} ({type(number).__name__}), expected a number")
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}: found {number}, expected a finite number above 0")
    growth = math.sqrt(r * out_features / (3 * init_r))
    return AdaLoraRates(lr_multiplier * lr, init_r * (lora_alpha / r) * growth / lr_multiplier)
