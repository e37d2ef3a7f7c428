"""What contestants are called where they are timed and on the page; needs neither torch nor Triton."""

from __future__ import annotations

PLAIN, SPECIALISED, WITHOUT_OVERLAP = "plain", "specialised", ", without overlap"
SHRINK, LIBRARY_SHRINK = "shrink", "shrink, library"
AFTER, FIRST = "library, S·Bᵀ after", "library, S·Bᵀ first"
FROZEN = "frozen"
KINDS, LIBRARIES = ("LoRA", "AdaLoRA"), ("peft", "ours")


def training(kind: str, library: str) -> str:
    """A model's training step."""
    return f"{kind}, {library}"
