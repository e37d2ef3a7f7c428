"""Progress on standard error: bars with the time left on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SPEED_PERIOD = 600.0


class DemoProgress:
    """One bar for the whole demo and one for what it is doing now.

    Args:
        total: size of the whole demo, in the units of ``begin``'s weight times size.
        title: of the bar for all of it.
    """

    def __init__(self, total: float, console: Console, title: str = "whole demo") -> None:
        self._console = console
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:<12}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self._live,
            # One unit of a comparison, a whole training, takes longer than the half minute that is usual here.
            speed_estimate_period=SPEED_PERIOD,
        )
        self._whole = self._bars.add_task(title, total=total, note="", visible=self._live)
        self._task: TaskID | None = None
        self._title, self._size, self._weight = "", 0, 1.0
        self._before, self._first, self._done = 0.0, 0, 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> DemoProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, size: int, weight: float = 1.0, unit: str = "steps") -> None:
        """Start a part of ``size`` steps (or other units), each ``weight`` of the whole's."""
        self._title, self._size, self._weight = title, size, weight
        self._first = self._done = 0
        self._began = self._last_line = time.monotonic()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(title, total=size, note="")
        if not self._live:
            self._console.print(f"{title}: {size} {unit}", highlight=False)

    def advance(self, done: int, note: str = "") -> None:
        """Say that ``done`` steps of the current part are done; the first call may continue an earlier run."""
        assert self._task is not None
        if self._done == 0 and done > 1:
            self._first = done
            self._take_stored(self._task, done)
            self._take_stored(self._whole, self._before + self._weight * done)
        self._done = done
        self._bars.update(self._task, completed=done, note=note)
        self._bars.update(self._whole, completed=self._before + self._weight * done)
        now = time.monotonic()
        if not self._live and now - self._last_line >= SECONDS_BETWEEN_LINES and done > self._first:
            self._last_line = now
            left = (now - self._began) / (done - self._first) * (self._size - done)
            self._console.print(
                f"{self._title}: {done} of {self._size}{', ' + note if note else ''}, about {left:.0f} s left",
                highlight=False,
            )

    def end(self) -> None:
        """The current part is complete, whatever number of steps it took; none means that it was stored."""
        self._before += self._weight * self._size
        if self._done == 0:
            self._take_stored(self._whole, self._before)
        self._bars.update(self._whole, completed=self._before)

    def _take_stored(self, bar: TaskID, completed: float) -> None:
        """Move a bar by what an earlier run had done: it took no time now and says nothing of the speed."""
        (task,) = (task for task in self._bars.tasks if task.id == bar)
        began = task.start_time
        self._bars.reset(bar, completed=completed)  # type: ignore[arg-type]  # a float, as `update` takes it
        task.start_time = began

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
