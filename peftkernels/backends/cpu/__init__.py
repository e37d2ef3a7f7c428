"""Loads the compiled extension, which implements the `.cpu` overloads in C++ (csrc/cpu), and says why it cannot."""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

PACK_MODES = ("both", "forward", "off")
_mode = os.environ.get("PEFTKERNELS_CPU_PACK", "both")
_limit: int | str = os.environ.get("PEFTKERNELS_CPU_PACK_LIMIT", "50%")

_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[a-z]*)", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and the reason in words."""
    try:
        extension = importlib.import_module("peftkernels._C")
    except ModuleNotFoundError:
        return None, "the C++ extension was not built (no compiler at installation, or installed without torch)"
    except ImportError as error:
        return None, f"the C++ extension does not load with torch {torch.__version__}: {error}"
    built_with = extension.build_facts()["torch"]
    if built_with.split("+")[0] != torch.__version__.split("+")[0]:
        return None, f"the C++ extension was built for torch {built_with}, found {torch.__version__}: reinstall"
    if _mode not in PACK_MODES:
        raise ValueError(f"PEFTKERNELS_CPU_PACK: found {_mode!r}, expected one of {', '.join(PACK_MODES)}")
    limit = _bytes_or_share("PEFTKERNELS_CPU_PACK_LIMIT", _limit)
    extension.set_pack_mode(_mode)
    extension.set_pack_limit(*limit)
    return extension, None


def unavailable_reason() -> str | None:
    """None when the C++ kernels can run, else why not."""
    return _load()[1]


def _extension() -> ModuleType:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(f"impl='cpu' cannot run: {reason}")
    return extension


@functools.cache
def has_bf16_kernels() -> bool:
    """Return True if this processor has matrix instructions for bf16 that ATen's kernels use.

    It is computed all the same, in a loop slower than the library's own matmul.
    """
    return bool(build_facts()["bf16_kernels"])


def keeps_packs() -> bool:
    """Return True if the packed copies of frozen weights outlive a call."""
    return _mode != "off"


def direct_call(
    automatic: Sequence[torch.dtype],
    rank_plan: type,
    second_derivatives: Callable[..., list[Tensor | None]],
) -> Callable[..., torch.Tensor | None]:
    """The C++ entry for plain calls, told for which dtypes of x it is taken when "auto" is asked for.

    It takes lora_linear's arguments by position and returns y, or None with nothing done. Its gradients are
    differentiated by `second_derivatives`, that of `composition`.
    """
    return _extension().direct_call(automatic, rank_plan, second_derivatives)


def pack_refusal(weight: Tensor) -> str | None:
    """Why every call would have to pack `weight` anew: "limit" (no room within it) or "memory" (the system gave none).

    None when its packs are kept. To ask counts as a call: now and then it makes room, at the cost of weights that were
    not used for as long, or asks the system again.
    """
    reason: str | None = _extension().pack_refusal(weight)
    return reason


def build_facts() -> dict[str, object]:
    """How the extension was built and what it found on this processor."""
    return dict(_extension().build_facts())


def pack_cache_stats() -> dict[str, int | str | None]:
    """The pack cache.

    `mode`; `weights` that have packs; `entries`, the packs; their `bytes`; `limit_setting` and the `limit` in bytes
    that it means as things stand (None: no limit); `refused` weights for whose packs there was no room; `hits` and
    `misses` since the start.
    """
    return {**_extension().pack_cache_stats(), "limit_setting": str(_limit)}


def set_pack_mode(mode: str) -> None:
    """Choose which packed copies of frozen weights are kept: "both", "forward" or "off".

    "both" keeps one for the forward and one for the backward pass (twice the weight's bytes), "forward" only the
    first, "off" packs anew in every call. Packs that the new mode does not keep are freed.
    """
    if mode not in PACK_MODES:
        raise ValueError(f"mode: found {mode!r}, expected one of {', '.join(PACK_MODES)}")
    global _mode
    _extension().set_pack_mode(mode)
    _mode = mode


def set_pack_limit(limit: int | str) -> None:
    """Choose how much memory the packed copies of frozen weights may take.

    A number of bytes (1073741824, "1GiB", "1.5GB"), a share ("50%") of the memory that would be available to this
    process if it held no packs, looked up whenever a pack is made, or "unlimited". Where less is allowed than the packs
    take, those of the weights that have not been used for longest are freed. A weight is kept whole or not at all, and
    once there is no more room, weights that have none are served without packs: see `pack_refusal`.

    Args:
        limit: what the packs may take.

    Raises:
        TypeError, ValueError: anything else.
    """
    bytes_and_share = _bytes_or_share("limit", limit)
    global _limit
    _extension().set_pack_limit(*bytes_and_share)
    _limit = limit


def _bytes_or_share(name: str, limit: int | str) -> tuple[int | None, float | None]:
    """(bytes, None), (None, share), or (None, None) for no limit."""
    if isinstance(limit, bool) or not isinstance(limit, (int, str)):
        raise TypeError(f"{name}: found {type(limit).__name__}, expected int or str")
    if limit == "unlimited":
        return None, None
    parts = _NUMBER_AND_UNIT.fullmatch(str(limit).strip())
    if parts is not None:
        number, unit = float(parts[1]), parts[2].lower()
        if unit == "%" and number <= 100:
            return None, number / 100
        if unit in _UNITS and number * _UNITS[unit] < 2**63:
            return int(number * _UNITS[unit]), None
    raise ValueError(
        f"{name}: found {limit!r}, expected a number of bytes such as 4GiB, 500MB or 0, a share of the available "
        "memory from 0% to 100%, or unlimited"
    )


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not tell."""
    available = _extension().available_memory()
    return None if available is None else int(available)


def forget_weight(weight: Tensor) -> None:
    """Free the packs of `weight` and of every other weight in the same memory; nothing where there are no kernels."""
    extension = _load()[0]
    if extension is not None:
        extension.forget_weight(weight)


def clear_pack_cache() -> None:
    """Free every pack; the next call on a weight packs it again."""
    _extension().clear_pack_cache()
