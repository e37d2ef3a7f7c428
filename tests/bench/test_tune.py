"""Calibration: the fastest right candidate is chosen, and a table comes out that the backend reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tune
from bench.gpu import device as devices
from bench.gpu.device import Host
from bench.tune import BARE, SMOKE, ProductBench, best
from bench.verify import WrongResultError
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import BACKWARD, FORWARD, LIBRARY, TAIL, Choice, Product
from peftkernels.cli.timing import Effort, Samples

HOST = Host(torch.device("cpu"))
ROOT = Path(__file__).parents[2]
HOPPER = (9, 0)
FAST, SLOW = Choice(TAIL, "tma-128x256x64-8w-3s"), Choice(TAIL, "tma-128x128x64-8w-4s")
PRODUCTS = [Product(direction, "float32", m, 24, 32) for m in (5, 600) for direction in (FORWARD, BACKWARD)]


def test_every_product_of_the_grid_is_calibrated_training_first() -> None:
    wanted = tune.products(False, ["bfloat16"])
    assert len(wanted) == len(set(wanted)) == 7 * 7 * 2
    assert {p.m for p in wanted[:28]} == {2048, 8192} and {p.m for p in wanted[-14:]} == {16384}
    assert {(p.n, p.k) for p in wanted} >= {(11008, 4096), (4096, 14336), (28672, 8192), (1024, 4096)}
    assert {p.dtype for p in tune.products(False, ["float16", "float32"])} == {"float16", "float32"}


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ({"library": 1.10, "a": 1.05, "b": 1.04}, "b"),
        ({"library": 1.10, "a": 1.098}, "library"),
        ({"library": 1.00, "a": 1.2}, "library"),
        ({"a": 1.3, "b": 1.2}, "b"),
    ],
)
def test_the_fastest_is_chosen_where_it_is_worth_leaving_the_library(ratios: dict[str, float], chosen: str) -> None:
    assert best(ratios) == chosen


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_the_bare_product_and_candidates_take_turns(product: Product) -> None:
    """On the eager backend, which computes every choice alike: right results are let in, and all of them are timed."""
    bench = ProductBench(product, HOST, "eager")
    bench.add(Choice(LIBRARY))
    bench.add(FAST)
    assert set(bench.contestants) == {BARE, "library", str(FAST)}
    assert bench.recorded == (product.m <= 512)
    ratios = bench.ratios(SMOKE.brief, SMOKE.brief_turn)
    assert set(ratios) == {"library", str(FAST)} and all(ratio > 0 for ratio in ratios.values())
    bench.keep([str(FAST)])
    assert set(bench.ratios(SMOKE.long, SMOKE.long_turn)) == {str(FAST)}


def test_a_candidate_runs_while_its_choice_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Choice | None] = []
    sound = ProductBench._call

    def watched(bench: ProductBench, i: int) -> Tensor:
        seen.append(routes.state()[0])
        return sound(bench, i)

    monkeypatch.setattr(ProductBench, "_call", watched)
    bench = ProductBench(PRODUCTS[2], HOST, "eager")
    bench.add(FAST)
    bench.add(SLOW)
    for choice in (SLOW, FAST):
        bench.turn(str(choice), 0, 2)
    bench.turn(BARE, 0, 1)
    assert seen == [FAST, SLOW, SLOW, SLOW, FAST, FAST] and routes.state()[0] is None


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("fault", ["scaled", "element", "unwritten"])
def test_a_wrong_candidate_is_not_let_in(direction: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = ProductBench._call

    def wrong(bench: ProductBench, i: int) -> Tensor:
        found = sound(bench, i)
        if fault == "scaled":
            return found * 1.001
        spoilt = (
            found.clone() if fault == "element" else torch.empty_like(found).index_copy_(0, torch.arange(3), found[:3])
        )
        if fault == "element":
            spoilt.view(-1)[11] += 0.05
        return spoilt

    monkeypatch.setattr(ProductBench, "_call", wrong)
    bench = ProductBench(Product(direction, "float32", 40, 24, 32), HOST, "eager")
    what = "y" if direction == FORWARD else "∂x"
    with pytest.raises(WrongResultError, match=rf"/32x24/M40/.*: {FAST}: {what} "):
        bench.add(FAST)
    assert set(bench.contestants) == {BARE}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stub:
    """A product whose candidates take as long as the test says; names of `wrong` and `broken` are not let in."""

    def __init__(
        self,
        clock: Clock,
        brief: dict[str, float],
        long: dict[str, float] | None = None,
        wrong: Sequence[str] = (),
        broken: Sequence[str] = (),
        cost: float = 1.0,
    ) -> None:
        self.contestants: dict[str, Choice | None] = {BARE: None}
        self.kept: list[str] = []
        self._clock, self._brief, self._long = clock, brief, long or brief
        self._wrong, self._broken, self._cost = wrong, broken, cost

    def add(self, choice: Choice) -> None:
        if str(choice) in self._wrong:
            raise WrongResultError(f"{choice} is wrong")
        if str(choice) in self._broken:
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        self.contestants[str(choice)] = choice

    def keep(self, names: Sequence[str]) -> None:
        self.kept = list(names)
        self.contestants = {name: self.contestants[name] for name in (BARE, *names)}

    def ratios(self, effort: Effort, turn_seconds: float) -> dict[str, float]:
        self._clock.now += self._cost / 2
        times = self._long if self.kept else self._brief
        return {name: times.get(name, 9.0) for name in self.contestants if name != BARE}


def _tune(
    clock: Clock, make: Any, products: Sequence[Product], limit: float | None = None, **rest: Any
) -> tuple[tune.Tuned, list[str]]:
    said: list[str] = []
    return tune.tune(products, HOPPER, make, limit, said.append, clock=clock, **rest), said


BIG = Product(FORWARD, "bfloat16", 2048, 4096, 4096)


def test_the_best_are_timed_for_longer_and_the_longer_figure_counts() -> None:
    clock, stubs = Clock(), []
    brief = {"library": 1.10, str(FAST): 1.02, str(SLOW): 1.03}
    long = {"library": 1.11, str(FAST): 1.05, str(SLOW): 1.04}

    def make(product: Product) -> Stub:
        stubs.append(Stub(clock, brief, long))
        return stubs[-1]

    found, said = _tune(clock, make, [BIG])
    (entry,) = found.entries
    assert entry.product == BIG and entry.choice == SLOW
    assert entry.ratios["library"] == 1.11 and entry.ratios[str(SLOW)] == 1.04
    assert len(entry.ratios) == len(routes.candidates(BIG, HOPPER)) and list(entry.ratios.values()) == sorted(
        entry.ratios.values()
    )
    assert str(FAST) in stubs[0].kept and "library" in stubs[0].kept and len(stubs[0].kept) == tune.KEPT
    assert said == [f"[1/1] {tune.name_of(BIG)}: {SLOW} 1.040, library 1.110"]


def test_the_library_is_timed_for_longer_even_where_it_is_slow() -> None:
    clock, stubs = Clock(), []
    names = [str(choice) for choice in routes.candidates(BIG, HOPPER)[1:6]]
    times = {name: 1.0 + number / 100 for number, name in enumerate(names)} | {"library": 5.0}

    def make(product: Product) -> Stub:
        stubs.append(Stub(clock, times))
        return stubs[-1]

    found, _ = _tune(clock, make, [BIG])
    assert stubs[0].kept == [*names[:4], "library"] and str(found.entries[0].choice) == names[0]


def test_wrong_candidates_are_told_from_those_that_cannot_run() -> None:
    clock = Clock()
    times = {"library": 1.1, str(FAST): 0.9, str(SLOW): 0.8}
    found, said = _tune(clock, lambda product: Stub(clock, times, wrong=[str(FAST)], broken=[str(SLOW)]), [BIG, BIG])
    assert [str(entry.choice) for entry in found.entries] == ["library", "library"]
    assert found.wrong == [f"{FAST} is wrong"] * 2
    assert found.broken == {str(SLOW): "RuntimeError: out of resource: shared memory"}
    assert sum(line.startswith("cannot run: ") for line in said) == 1
    assert all(str(name) not in entry.ratios for name in (FAST, SLOW) for entry in found.entries)


def test_a_candidate_that_breaks_while_it_is_timed_fails_the_run() -> None:
    clock = Clock()

    class Breaking(Stub):
        def ratios(self, effort: Effort, turn_seconds: float) -> dict[str, float]:
            raise RuntimeError("an illegal memory access")

    found, said = _tune(clock, lambda product: Breaking(clock, {}), [BIG, BIG])
    assert len(found.wrong) == 2 and not found.entries
    found, said = _tune(clock, lambda product: Breaking(clock, {}), [BIG, BIG], alive=lambda: False)
    assert len(found.wrong) == 1 and said[-1] == "the device no longer answers"


def test_calibration_ends_in_time() -> None:
    clock = Clock()
    found, said = _tune(clock, lambda product: Stub(clock, {"library": 1.0}), [BIG] * 10, limit=4.5)
    assert len(found.entries) == 4 and len(found.left_out) == 6 and clock.now <= 4.5
    assert said[-1] == "time ran out: 6 of 10 products are left to their nearest neighbours"


def test_ratios_are_medians_of_paired_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = ({BARE: 1.0, "library": 1.2}, {BARE: 2.0, "library": 2.2}, {BARE: 4.0, "library": 12.0})
    monkeypatch.setattr(tune, "interleave", lambda *_, **__: Samples(BARE, rounds))
    bench = ProductBench(PRODUCTS[2], HOST, "eager")
    bench.add(Choice(LIBRARY))
    assert bench.ratios(SMOKE.brief, 1.0) == {"library": pytest.approx(1.2)}


def test_a_smoke_run_writes_a_table_that_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--smoke", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == routes.file_name(HOST.name) != routes.file_name("NVIDIA H200")
    table = routes.read_table(path)
    assert table.gpu == HOST.name and {"date", "commit", "torch", "triton"} == set(table.measured)
    assert [entry.product for entry in table.entries] == tune.products(True, ["bfloat16"])
    for entry in table.entries:
        assert set(entry.ratios) == {str(choice) for choice in routes.candidates(entry.product, HOPPER)}
        assert str(entry.choice) in entry.ratios
    out = capsys.readouterr().out
    assert "every candidate runs on the eager backend: " in out and f"written: {path}" in out


def test_the_backend_takes_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the folder is what choices are made by, at the product and near it."""
    entry = routes.Entry(BIG, FAST, {str(FAST): 1.01, "library": 1.1})
    routes.write_table(tmp_path / routes.file_name("NVIDIA H200"), routes.Table("NVIDIA H200", {}, (entry,)))
    monkeypatch.setenv("PEFTKERNELS_TRITON_TABLES", str(tmp_path))
    routes.forget_tables()
    try:
        assert routes.choose(BIG, "NVIDIA H200", HOPPER)[0] == FAST
    finally:
        monkeypatch.undo()
        routes.forget_tables()


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path)]
    entry = routes.Entry(BIG, Choice(LIBRARY), {"library": 1.0})
    for found, code, files in (
        (tune.Tuned([entry], wrong=["something"]), 1, 1),
        (tune.Tuned(wrong=["everything"]), 1, 0),
        (tune.Tuned(), 2, 0),
        (tune.Tuned([entry], broken={"a": "no room"}), 0, 1),
    ):
        monkeypatch.setattr(tune, "tune", lambda *_, found=found, **__: found)
        assert tune.main(arguments) == code
        assert len(list(tmp_path.iterdir())) == files
        for path in tmp_path.iterdir():
            path.unlink()
    capsys.readouterr()
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert "bench.tune: error: --device: found no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "--device: cpu is for --smoke alone" in capsys.readouterr().err


INTERPRETED = """
import torch
from bench.gpu.device import Host
from bench.tune import ProductBench
from peftkernels.backends.triton.linear import routes
for direction, rows in (("forward", 17), ("backward", 17), ("forward", 1)):
    product = routes.Product(direction, "float16", rows, 48, 64)
    bench = ProductBench(product, Host(torch.device("cpu")), "triton")
    for choice in routes.candidates(product, (9, 0)):
        bench.add(choice)
    print(product.direction, product.m, *(name for name in bench.contestants))
"""


def test_the_kernels_themselves_are_right_and_take_their_arguments(tmp_path: Path) -> None:
    """Every candidate of three small products, interpreted on the CPU, through the tuner's own calls."""
    pytest.importorskip("triton", reason="the kernels are Triton's")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["forward", "17"], ["backward", "17"], ["forward", "1"]]
    assert all("library" in line and any(name.startswith("tail:") for name in line) for line in lines)
    assert any(name.startswith("decode:") for name in lines[2])
