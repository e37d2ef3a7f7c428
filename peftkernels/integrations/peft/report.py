"""What `apply_to_peft` did, and what came of it: module by module, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from peftkernels.integrations.peft.table import columns


@dataclass(frozen=True)
class Row:
    """One adapted module.

    Attributes:
        module: its path.
        kind: peft's class of it.
        served: True where its calls will be served.
        reason: why they will not be; empty where they will.
    """

    module: str
    kind: str
    served: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `apply_to_peft` did, module by module; prints as a table.

    Attributes:
        rows: one for each adapted module.
    """

    rows: tuple[Row, ...]

    @property
    def served(self) -> int:
        """Modules that will be served."""
        return sum(row.served for row in self.rows)

    def __str__(self) -> str:
        cells = [(row.module, row.kind, "yes" if row.served else "no", row.reason) for row in self.rows]
        table = columns(("module", "layer", "served", "reason"), cells)
        return f"{table}\n{self.served} of {len(self.rows)} adapted modules are served by peftkernels"


@dataclass(frozen=True)
class Stats:
    """Calls of adapters since `apply_to_peft`, or since the counts were reset.

    Attributes:
        served: calls that ran on our kernels.
        fell_back: calls that ran peft's own code.
        reasons: how many of these for which reason.
        modules: (served, fell back) by module path, of the patched modules.
        allocation: (served, fell back, reasons) of AdaLoRA's own work: updates of scores, masks, orthogonality terms;
            None without an AdaLoRA model.
        shared: served calls whose x·Aᵀ was made together with that of others which read the same input.
        unserved: the adapted modules whose calls run peft's own code without being counted, by module path, and why:
            not patched, or no call came because the module has a forward of its own.
    """

    served: int
    fell_back: int
    reasons: dict[str, int]
    modules: dict[str, tuple[int, int]] = field(repr=False)
    allocation: tuple[int, int, dict[str, int]] | None = None
    shared: int = 0
    unserved: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = _share("adapter calls", self.served, self.fell_back, self.reasons)
        if self.shared:
            lines.append(f"  {self.shared} of them with an x A^T made for several at once")
        if self.unserved:
            lines.append(f"{len(self.unserved)} adapted modules run peft's own code, their calls are not counted")
            lines += _counted(Counter(self.unserved.values()))
        if self.allocation is not None:
            lines += _share("calls of AdaLoRA's allocation", *self.allocation)
        return "\n".join(lines)


def _share(what: str, served: int, fell_back: int, reasons: dict[str, int]) -> list[str]:
    calls = served + fell_back
    share = f" ({100 * served / calls:.0f} %)" if calls else ""
    return [f"{served} of {calls} {what} served{share}", *_counted(reasons)]


def _counted(reasons: Mapping[str, int]) -> list[str]:
    return [f"  {count} x {reason}" for reason, count in sorted(reasons.items())]
