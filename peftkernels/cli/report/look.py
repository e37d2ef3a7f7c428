"""The colours of the pictures, for paper and light pages and for dark ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_DOTS_PER_INCH = 130


@dataclass(frozen=True)
class Look:
    """Named colours; ``settings`` are matplotlib's for everything else."""

    name: str
    background: str
    text: str
    grid: str
    band: str
    active: str
    budget: str
    masked: str
    revived: str
    trouble: str
    others: tuple[str, ...]
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
        settings: dict[str, Any] = dict.fromkeys(ink, self.text)
        settings |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), self.background)
        settings |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": self.grid}
        # Names of modules and groups are no formulas, whatever they hold.
        settings |= {"text.parse_math": False}
        object.__setattr__(self, "settings", settings)


LIGHT = Look(
    name="light",
    background="#ffffff",
    text="#1d232b",
    grid="#e3e6ea",
    band="#eceff3",
    active="#2563b0",
    budget="#1d232b",
    masked="#8a94a3",
    revived="#c2680c",
    trouble="#b3261e",
    others=("#2563b0", "#c2680c", "#2f8f5b", "#8145b5", "#b3261e", "#0f8b8d", "#8a6d1c", "#5b6572"),
)
DARK = Look(
    name="dark",
    background="#15191f",
    text="#d9dee5",
    grid="#2c333c",
    band="#212730",
    active="#6ea8fe",
    budget="#e6eaf0",
    masked="#7d8896",
    revived="#f0a04b",
    trouble="#ff8a80",
    others=("#6ea8fe", "#f0a04b", "#62c48e", "#c08cf0", "#ff8a80", "#4fd1d3", "#d9b84a", "#a7b1be"),
)


def png(draw: Callable[[Look], Figure], look: Look) -> bytes:
    """The figure that ``draw`` makes, in the colours of ``look``."""
    with rc_context(look.settings):
        content = BytesIO()
        draw(look).savefig(content, format="png", dpi=_DOTS_PER_INCH)
    return content.getvalue()
