"""Processes that write files and are killed at a random moment: whoever reads afterwards finds the old or the new.

A child writes one kind of file again and again, each time with another content, and says before each write which one it
is. It is sent SIGKILL, or SIGINT as Ctrl-C sends it. What lies there then is one of the contents that were announced,
whole, and not an older one than the last but one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks.attack import TESTS, Counts
from demo.checkpoint import Store, read_record, write_json
from peftkernels.allocation import DecisionLog, read_log
from peftkernels.allocation.costs import load_costs, save_costs
from peftkernels.allocation.logs.card import CARD_NAME, adapter_card, write_card
from peftkernels.allocation.logs.run_log import RunLog
from peftkernels.allocation.strategies.rank_prior import PriorModule, RankPrior
from peftkernels.cli.report.command import run_report
from peftkernels.integrations.peft import load_adapter, save_adapter
from peftkernels.integrations.transformers.checkpoint_state import read_state, write_state
from peftkernels.nn import AdaLoRALinear, LoRALinear

NAME = "kills"
TITLE = "processes that write files are killed, or interrupted, at a random moment"
SHORT, LONG = 20, 1500

WIDTH, SIZE = 16, 50_000
# A child's first write waits for this long at most: it has to import torch.
PATIENCE = 120


def _net(value: int, gated: bool = False) -> nn.Sequential:
    """A model whose adapter, rank and configuration all say `value`."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    nn.init.zeros_(net[0].weight)
    if value:
        kind = AdaLoRALinear if gated else LoRALinear
        net[0] = kind.from_linear(net[0], 2 + value % 3, lora_alpha=value)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "lora" in name:
                    parameter.fill_(1.0)
    return net


def _write_adapter(folder: Path, value: int) -> None:
    save_adapter(_net(value), folder)


def _read_adapter(folder: Path) -> int:
    """The value that scale and rank of what was read agree on: y is alpha/r · r · WIDTH = alpha · WIDTH."""
    net = _net(0)
    load_adapter(net, folder)
    layer = net[0]
    y = float(net(torch.ones(1, WIDTH))[0, 0].detach())
    value = round(y / WIDTH)
    if not isinstance(layer, LoRALinear) or layer.lora_alpha != value or layer.r != 2 + value % 3:
        raise ValueError(f"found an output of {y}, lora_alpha {layer.lora_alpha} and r {layer.r}")
    return value


def _write_gated(folder: Path, value: int) -> None:
    save_adapter(_net(value, gated=True), folder)


def _read_gated(folder: Path) -> int:
    net = _net(0)
    load_adapter(net, folder)
    layer = net[0]
    if not isinstance(layer, AdaLoRALinear) or layer.r != 2 + int(layer.lora_alpha) % 3:
        raise ValueError(f"found {layer}")
    return int(layer.lora_alpha)


def _write_state(folder: Path, value: int) -> None:
    write_state(folder, {"values": torch.full((SIZE,), value)}, {"value": value})


def _read_state(folder: Path) -> int:
    tensors, facts = read_state(folder)
    return _agreed(facts["value"], tensors["values"])


def _agreed(value: int, tensor: torch.Tensor) -> int:
    if not bool((tensor == value).all()):
        raise ValueError(f"found {value} beside {tensor.unique().tolist()}")
    return value


def _write_training(folder: Path, value: int) -> None:
    Store(folder, {}).save_training({"value": value, "values": torch.full((SIZE,), value)})


def _read_training(folder: Path) -> int:
    found = Store(folder, {}).load_training()
    if found is None:
        raise FileNotFoundError("training.pt")
    return _agreed(found["value"], found["values"])


def _write_results(folder: Path, value: int) -> None:
    write_json(folder / "results.json", {"value": value, "values": [value] * 5000})


def _read_results(folder: Path) -> int:
    found = read_record(folder / "results.json")
    return _agreed(found["value"], torch.tensor(found["values"]))


def _write_prior(folder: Path, value: int) -> None:
    RankPrior((PriorModule("q", 0.5, 8, 8, value, value),) * 500).save(folder / "prior.json")


def _read_prior(folder: Path) -> int:
    modules = RankPrior.load(folder / "prior.json").modules
    return _agreed(modules[0].kept, torch.tensor([module.rank for module in modules]))


def _write_costs(folder: Path, value: int) -> None:
    save_costs({str(place): float(value) for place in range(500)}, folder / "costs.json")


def _read_costs(folder: Path) -> int:
    costs = list(load_costs(folder / "costs.json").values())
    return _agreed(int(costs[0]), torch.tensor(costs))


def _write_card(folder: Path, value: int) -> None:
    pattern = {f"m{place}": [True] * value for place in range(50)}
    card = adapter_card(
        None, config={}, seeds={"all": value}, data_fingerprint=f"texts {value}", pattern=pattern, versions={}
    )
    if not write_card(folder, card):
        raise ValueError("the card that is there was taken for somebody else's")


def _read_card(folder: Path) -> int:
    text = (folder / CARD_NAME).read_text()
    value = int(text.partition("| data | texts ")[2].partition(" ")[0])
    if text.count(f"{value}/{value}") != 50:
        raise ValueError(f"found a card of {len(text)} characters that is not whole")
    return value


_LOG = "decisions.jsonl"
_FACTS: dict[str, Any] = {"strategy": "s", "settings": {}, "unit": "ranks", "step": 0}
_MODULES = [{"name": f"m{place}", "rank": 8} for place in range(40)]


def _write_log(folder: Path, value: int) -> None:
    """One decision more, of 40 modules that kept as many ranks, by a run that was resumed."""
    with DecisionLog(folder / _LOG) as log:
        log.on_start({**_FACTS, "modules": _MODULES, "step": value - 1})
        kept = [[place < value % 8 for place in range(8)]] * len(_MODULES)
        log.on_decision(value, float(value), [0.0] * len(_MODULES), [[float(value)] * 8] * len(_MODULES), kept)


def _read_log(folder: Path) -> int:
    log: RunLog = read_log(folder / _LOG)
    for number, decision in enumerate(log.decisions, start=1):
        right = decision.step == number == decision.budget and bool((decision.scores == number).all())
        if not right or decision.kept.sum() != len(_MODULES) * (number % 8):
            raise ValueError(f"decision {number} of {len(log.decisions)} is another")
    return len(log.decisions)


def _write_report(folder: Path, value: int) -> None:
    """The page of a run that has decided so often; pictures are left out, which take seconds."""
    from peftkernels.cli.report import page

    page._both = lambda draw: (b"\x89PNG" + bytes(40),) * 2
    _write_log(folder, value)
    with contextlib.redirect_stdout(None):
        run_report(folder, None, as_json=False)


def _read_report(folder: Path) -> int:
    figures = json.loads((folder / "report" / "report.json").read_text())
    steps = next(iter(figures["runs"].values()))["decisions"]["step"]
    html = (folder / "report" / "index.html").read_text()
    if not html.endswith("</html>"):
        raise ValueError("found half a page")
    return len(steps)


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "adapters": (_write_adapter, _read_adapter),
    "gated adapters": (_write_gated, _read_gated),
    "allocators' states": (_write_state, _read_state),
    "checkpoints": (_write_training, _read_training),
    "results": (_write_results, _read_results),
    "priors": (_write_prior, _read_prior),
    "costs": (_write_costs, _read_costs),
    "cards": (_write_card, _read_card),
    "decision logs": (_write_log, _read_log),
    "reports": (_write_report, _read_report),
}
SIGNALS = (signal.SIGKILL, signal.SIGINT)


def run(rounds: int, seed: int) -> Counts:
    """Kill `rounds` writers; the kinds of files and the signals take turns."""
    counts = Counts()
    dice = random.Random(seed)
    places = [(kind, number) for number in SIGNALS for kind in KINDS]
    # Writers are forked from one process that has imported everything: starting takes most of a round otherwise.
    with tempfile.TemporaryDirectory() as scratch, _Server() as server:
        for at in range(rounds):
            kind, number = places[at % len(places)]
            fault = server.kill(kind, number, Path(scratch) / str(at), dice)
            counts.tried[f"{kind} by {number.name}"] += 1
            if fault is not None:
                counts.faults.append(f"round {at} of seed {seed}: {kind} by {number.name}: {fault}")
    return counts


class _Server:
    """A process that forks a writer for each line it gets: kind, folder, and where to announce, as JSON."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "attacks.kills"]
        self._process = subprocess.Popen(
            command,
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(PATIENCE)

    def kill(self, kind: str, number: signal.Signals, folder: Path, dice: random.Random) -> str | None:
        """What was wrong after a writer was killed; None for nothing."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder.mkdir()
        said = folder.with_suffix(".said")
        self._process.stdin.write(json.dumps([kind, str(folder), str(said)]) + "\n")
        self._process.stdin.flush()
        writer = int(self._process.stdout.readline())
        end = time.monotonic() + PATIENCE
        # The first write is over once the second is announced: from then on something must be there.
        while _announced(said) < 2:
            if time.monotonic() > end:
                os.kill(writer, signal.SIGKILL)
                return f"no second write within {PATIENCE} s"
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(writer, number)
        # Python drops a KeyboardInterrupt that comes while an object is thrown away.
        again = threading.Timer(5, os.kill, (writer, signal.SIGKILL))
        again.start()
        # The server says when the writer has ended.
        self._process.stdout.readline()
        again.cancel()
        last = _announced(said)
        try:
            found = KINDS[kind][1](folder)
        except Exception as error:
            return f"write {last} was interrupted and left what cannot be read: {type(error).__name__}: {error}"
        if found not in (last, last - 1):
            return f"write {last} was interrupted and left {found}"
        before = {path.name for path in folder.rglob("*.partial")}
        KINDS[kind][0](folder, found + 1)
        left = {path.name for path in folder.rglob("*.partial")}
        shutil.rmtree(folder)
        return f"the next write left {sorted(left)} of {sorted(before)}" if left else None


def _announced(said: Path) -> int:
    """How many writes a writer has begun."""
    return said.stat().st_size if said.exists() else 0


def _serve() -> None:
    for line in sys.stdin:
        kind, folder, said = json.loads(line)
        writer = os.fork()
        if writer == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                with open(said, "ab", buffering=0) as announced:
                    value = 0
                    while True:
                        value += 1
                        announced.write(b".")
                        KINDS[kind][0](Path(folder), value)
            finally:
                os._exit(1)
        print(writer, flush=True)
        os.waitpid(writer, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _serve()
