"""Loads the compiled extension, which implements the `.cpu` overloads in C++ (csrc/cpu), and says why it cannot."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

PACK_MODES = ("both", "forward", "off")
_mode = os.environ.get("PEFTKERNELS_CPU_PACK", "both")


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
    extension.set_pack_mode(_mode)
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
def has_kernels_for(dtype: torch.dtype) -> bool:
    """Whether this processor has matrix instructions for `dtype` that ATen's kernels use; fp32 always does.

    bf16 is computed all the same, in a loop slower than the library's own matmul; fp16 is not.
    """
    if dtype is torch.float32:
        return True
    return bool(build_facts()["bf16_kernels" if dtype is torch.bfloat16 else "fp16_kernels"])


def keeps_packs() -> bool:
    """Whether the packed copies of frozen weights outlive a call."""
    return _mode != "off"


def direct_call(
    automatic: Sequence[torch.dtype], named: Sequence[torch.dtype], rank_plan: type
) -> Callable[..., torch.Tensor | None]:
    """The C++ entry for plain calls, for the dtypes of x that are served when "auto" and when "cpu" is asked for.

    It takes lora_linear's arguments by position and returns y, or None with nothing done.
    """
    return _extension().direct_call(automatic, named, rank_plan)


def build_facts() -> dict[str, object]:
    """How the extension was built and what it found on this processor."""
    return dict(_extension().build_facts())


def pack_cache_stats() -> dict[str, int | str]:
    """The pack cache: `mode`, live `entries`, their `bytes`, and `hits` and `misses` since the start."""
    return dict(_extension().pack_cache_stats())


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


def clear_pack_cache() -> None:
    """Free every pack; the next call on a weight packs it again."""
    _extension().clear_pack_cache()
