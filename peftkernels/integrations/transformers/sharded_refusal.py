"""Refusing trainings whose adapter parameters are not plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def refuse_sharded(args: Any, parameters: Mapping[str, Tensor]) -> None:
    """Refuse DeepSpeed and FSDP.

    They leave a process with a part of a parameter, or with gradients elsewhere than in `.grad`: ranks would be judged
    by what is not there.

    Args:
        args: the TrainingArguments.
        parameters: the adapter's factors by name, each a matrix.

    Raises:
        NotImplementedError: the parameters are sharded.
    """
    kind = getattr(getattr(args, "distributed_state", None), "distributed_type", None)
    found = str(getattr(kind, "value", kind))
    if found in ("DEEPSPEED", "FSDP", "MEGATRON_LM") or getattr(args, "deepspeed", None):
        found = "DEEPSPEED" if getattr(args, "deepspeed", None) else found
        raise NotImplementedError(
            f"args: found training under {found}, expected one process or DistributedDataParallel: AdaLoraCallback "
            "does not allocate ranks of sharded parameters"
        )
    for name, parameter in parameters.items():
        plain = parameter.dim() == 2 and parameter.numel() > 0 and not hasattr(parameter, "ds_id")
        if not plain or hasattr(parameter, "placements"):
            raise NotImplementedError(
                f"model: found {name} as {type(parameter).__name__} of shape {tuple(parameter.shape)}, expected a "
                "plain matrix: AdaLoraCallback does not allocate ranks of sharded parameters (DeepSpeed, FSDP)"
            )
