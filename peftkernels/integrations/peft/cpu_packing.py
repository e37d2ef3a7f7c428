"""bitsandbytes' 4-bit weights on CPUs, kept in the layout whose products record gradients.

On a processor with AVX-512 BF16, bitsandbytes 0.50 repacks the weight of a layer in its first call in eval mode, rounds
its scales to bfloat16, and never packs it back: its product records no gradient from then on, in training neither, and
says nothing. Imported only where bitsandbytes is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional

_MAY_PACK = "support_avx512bf16_for_cpu"


def keep_from_packing(base: Any) -> dict[str, Any]:
    """Let a quantised layer keep its weight as it is, and unpack it if it was packed before.

    Returns:
        The attributes of the layer that were changed, with what they were.
    """
    if _packed(base):
        _unpack(base)
    if not vars(base).get(_MAY_PACK, False):
        return {}
    setattr(base, _MAY_PACK, False)
    return {_MAY_PACK: True}


def unpack_for_gradients(base: Any) -> None:
    """Unpack a weight that was packed all the same, if gradients are to be recorded."""
    if torch.is_grad_enabled() and _packed(base):
        _unpack(base)


def _packed(base: Any) -> bool:
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@torch.no_grad()
def _unpack(base: Any) -> None:
    """In place: the codes that the layer was made with, and the scales that packing rounded, in float32."""
    weight = base.weight
    state = weight.quant_state
    scales = state.absmax
    # Scales that were quantised themselves would be quantised again, from the rounded ones.
    state.original_nested = False
    weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales.t().reshape(-1).float()
