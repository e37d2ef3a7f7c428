"""How much of the machine other processes used while something was timed, from Linux's /proc/stat."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE, _IOWAIT = 3, 4
# Guest time is already contained in user and nice.
_COUNTED_FIELDS = 8


class ForeignLoad:
    """Context manager; afterwards ``share`` is other processes' part of the machine's processor time, 0 to 1.

    None where the system does not tell (no /proc/stat) or the time was too short to tell (its clock ticks at 100 Hz).
    Time stolen by a virtual machine's host counts as foreign.
    """

    share: float | None = None

    def __enter__(self) -> ForeignLoad:
        self._before = _machine_times()
        self._own_before = _own_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        own = _own_seconds() - self._own_before
        after = _machine_times()
        if self._before is None or after is None:
            return
        busy, total = (now - before for now, before in zip(after, self._before, strict=True))
        tick = 1.0 / os.sysconf("SC_CLK_TCK")
        if total >= 10 * tick:
            self.share = max(0.0, busy - own) / total


def _machine_times() -> tuple[float, float] | None:
    """Seconds all processors were busy, and seconds altogether, since the machine started."""
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()[1 : 1 + _COUNTED_FIELDS]
    except OSError:
        return None
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    seconds = [int(field) * tick for field in fields]
    total = sum(seconds)
    return total - seconds[_IDLE] - seconds[_IOWAIT], total


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
