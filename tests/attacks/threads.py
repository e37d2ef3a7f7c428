"""Threads call the operator and a layer, forward and backward, while others write, resize, replace and forget weights.

A weight is read while it is written: such a result may be anything. Once the writer has come to rest, every result must
be that of the weight as it is.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.attack import Counts
from peftkernels import lora_linear, weights_changed
from peftkernels.backends import cpu
from peftkernels.nn import LoRALinear

NAME = "threads"
TITLE = "weights change, die and are packed while threads read them"
SHORT, LONG = 10, 2_000

SHAPES = ((48, 64), (300, 260), (1500, 600))
READERS, WRITERS = 3, 2


class _Place:
    """A weight, the layer around it and its factors, which all threads use."""

    def __init__(self, dice: random.Random, shape: tuple[int, int]) -> None:
        self.dice = random.Random(dice.random())
        self.shape = shape
        self.x = torch.randn(dice.choice((1, 3, 40)), shape[1])
        self.renew()

    def renew(self) -> None:
        """Another layer, of more or fewer rows now and then; the old one dies with its last reader."""
        n, k = self.shape
        layer = LoRALinear(nn.Linear(k, n + self.dice.choice((0, 0, 16))), r=3, lora_alpha=6, impl="cpu")
        nn.init.normal_(layer.lora_B.weight)
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def read(self, impl: str, in_layer: bool) -> list[Tensor]:
        """y and ∂x."""
        x = self.x.clone().requires_grad_()
        layer = self.layer
        if in_layer:
            y = layer(x)
        else:
            y = lora_linear(
                x, layer.weight, layer.lora_A.weight, layer.lora_B.weight, bias=layer.bias, scaling=2.0, impl=impl
            )
        return [y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))]

    def wrong(self, impl: str, in_layer: bool) -> float:
        """How far the result is from plain PyTorch's on the weight as it is, as a part of its largest value."""
        found, exact = self.read(impl, in_layer), self.read("eager", False)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


def _counted(place: _Place) -> None:
    with torch.no_grad():
        place.weight.mul_(place.dice.choice((-1.0, 0.5, 1.5))).add_(0.01)


def _row(place: _Place) -> None:
    place.weight.data[place.dice.randrange(len(place.weight))] = place.dice.random()
    _settle(place)


def _element(place: _Place) -> None:
    place.weight.data[place.dice.randrange(len(place.weight)), 5] += 3.0
    weights_changed(place.layer if place.dice.random() < 0.5 else place.weight)


def _copy(place: _Place) -> None:
    with torch.no_grad():
        place.weight.copy_(torch.randn_like(place.weight))


def _data(place: _Place) -> None:
    place.weight.data = torch.randn_like(place.weight)


def _numpy(place: _Place) -> None:
    place.weight.detach().numpy()[:] *= -1.0
    _settle(place)


def _settle(place: _Place) -> None:
    """Rows are found by the next calls: of a large weight that meets few rows of x, by as many as it has blocks."""
    for _ in range(1 + len(place.weight) // 256):
        place.read("cpu", False)


WRITES: dict[str, Callable[[_Place], None]] = {
    "counted writes": _counted,
    "rows through .data": _row,
    "elements and weights_changed": _element,
    "copies": _copy,
    "storages replaced": _data,
    "numpy": _numpy,
    "layers replaced": _Place.renew,
}


def _settings(dice: random.Random, counts: Counts) -> None:
    kind = dice.choice(("mode", "limit", "clear"))
    if kind == "mode":
        cpu.set_pack_mode(dice.choice(cpu.PACK_MODES))
    elif kind == "limit":
        cpu.set_pack_limit(dice.choice((0, 200_000, 5_000_000, "50%", "unlimited")))
    else:
        cpu.clear_pack_cache()
    counts.tried[f"settings: {kind}"] += 1


def _round(dice: random.Random, counts: Counts, lock: threading.Lock, repeat: str) -> None:
    places = [_Place(dice, shape) for shape in SHAPES]
    # Only one writer at a time has a weight: two would leave nobody who knows when it is at rest.
    owners = [threading.Lock() for _ in places]
    resting = threading.Event()
    failures: list[str] = []

    def guarded(work: Callable[[random.Random], None], own: random.Random) -> None:
        try:
            work(own)
        except BaseException as failure:
            failures.append(f"{type(failure).__name__}: {failure}")

    def read(own: random.Random) -> None:
        while not resting.is_set():
            kind = "reads while writing"
            try:
                own.choice(places).read(own.choice(("auto", "cpu")), own.random() < 0.5)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                kind = "backward passes that autograd refused"
            with lock:
                counts.tried[kind] += 1

    def write(own: random.Random) -> None:
        for _ in range(6):
            at = own.randrange(len(places))
            kind = own.choice(list(WRITES))
            impl, in_layer = own.choice(("auto", "cpu")), own.random() < 0.5
            with owners[at]:
                WRITES[kind](places[at])
                off = places[at].wrong(impl, in_layer)
            with lock:
                counts.tried[f"settled reads after {kind}"] += 1
                if not off < 1e-3:
                    failures.append(f"{kind}, weight {tuple(places[at].weight.shape)}, {impl}: off by {off:.2g}")
                if own.random() < 0.3:
                    _settings(own, counts)

    readers = [threading.Thread(target=guarded, args=(read, random.Random(dice.random()))) for _ in range(READERS)]
    writers = [threading.Thread(target=guarded, args=(write, random.Random(dice.random()))) for _ in range(WRITERS)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    resting.set()
    for thread in readers:
        thread.join()
    for place in places:
        off = place.wrong("cpu", False)
        counts.tried["reads at the end"] += 1
        if not off < 1e-3:
            failures.append(f"at the end, weight {tuple(place.weight.shape)}: off by {off:.2g}")
    counts.faults += [f"{repeat}: {failure}" for failure in failures]


def run(rounds: int, seed: int) -> Counts:
    """See the top of this module."""
    counts = Counts()
    before = cpu.pack_cache_stats()
    threads = torch.get_num_threads()
    lock = threading.Lock()
    dice = random.Random(seed)
    torch.manual_seed(seed)
    try:
        for turn in range(rounds):
            torch.set_num_threads(dice.choice((1, 2)))
            _round(dice, counts, lock, f"round {turn} of seed {seed}")
    finally:
        torch.set_num_threads(threads)
        cpu.set_pack_mode(str(before["mode"]))
        cpu.set_pack_limit(str(before["limit_setting"]))
    return counts
