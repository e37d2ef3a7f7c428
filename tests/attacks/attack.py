"""What an attack counts and finds, and how its dangerous parts run in a child process."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

TESTS = Path(__file__).resolve().parent.parent


@dataclass
class Counts:
    """What an attack tried, by kind, and each fault in words, with what repeats it."""

    tried: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.tried.items()))
        lines = [f"{self.tried.total():,} tried ({kinds}), {len(self.faults):,} faults"]
        return "\n".join([*lines, *(f"  {fault}" for fault in self.faults)])


class Attack(Protocol):
    """The module of an attack."""

    NAME: str
    TITLE: str
    SHORT: int
    LONG: int
    run: Callable[[int, int], Counts]


def load(name: str) -> Attack:
    """The attack that is called ``name``, such as "public-calls" in public_calls.py."""
    return cast(Attack, importlib.import_module(f"attacks.{name.replace('-', '_')}"))


class Rounds(Protocol):
    """The module of an attack whose rounds do not depend on each other, and may crash."""

    NAME: str
    one: Callable[[int, int], tuple[str, str | None]]


def in_children(name: str, rounds: int, seed: int, seconds: float = 120) -> Counts:
    """Counts of ``one(round, seed)`` for every round, which returns the kind that was tried and the fault, if any.

    The rounds run in a child process. One that kills it, or takes longer than ``seconds``, is a fault, and a new child
    goes on behind it.
    """
    counts = Counts()
    first = 0
    while first < rounds:
        command = [sys.executable, "-m", "attacks.child", name, str(first), str(rounds), str(seed)]
        with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            first = _follow(child, counts, first, seed, seconds)
    return counts


def _follow(child: subprocess.Popen[str], counts: Counts, first: int, seed: int, seconds: float) -> int:
    """Read what a child reports until it ends; the round behind its last one."""
    assert child.stdout is not None and child.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    late = threading.Event()

    def kill() -> None:
        late.set()
        child.kill()

    at = first
    begun = False
    watch = threading.Timer(seconds, kill)
    watch.start()
    for line in child.stdout:
        found = json.loads(line)
        watch.cancel()
        watch = threading.Timer(seconds, kill)
        watch.start()
        if "kind" not in found:
            at, begun = found["round"], True
            continue
        counts.tried[found["kind"]] += 1
        if found["fault"] is not None:
            counts.faults.append(f"round {at} of seed {seed}: {found['fault']}")
        at, begun = at + 1, False
    code = child.wait()
    watch.cancel()
    reader.join()
    if code == 0:
        return at
    if not begun:
        raise RuntimeError("the child of an attack ended before its first round:\n" + "".join(errors))
    counts.tried["crashed"] += 1
    end = f"no answer in {seconds:g} s" if late.is_set() else death_of(code) or f"exit code {code}"
    counts.faults.append(f"round {at} of seed {seed}: {end}: " + "".join(errors[-5:]).strip())
    return at + 1


def death_of(code: int) -> str | None:
    """The signal in words that ended a process with this exit code, None for one that ended by itself."""
    return signal.Signals(-code).name if code < 0 else None
