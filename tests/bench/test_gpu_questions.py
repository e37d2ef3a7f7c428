"""The questions that are asked of a GPU: who takes part, what is verified, and the page that is made of the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.implementations import skip_unless_served
from torch.autograd import DeviceType

from bench import report
from bench.gpu import device
from bench.gpu.device import find
from bench.gpu.questions import __main__ as command
from bench.gpu.questions import page, parts, specialised, steps
from peftkernels.backends.triton.common import launch, tiles
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import BACKWARD, FORWARD, Product

ROOT = Path(__file__).parents[2]
LARGE = Product(FORWARD, "bfloat16", 8192, 4096, 4096)
SMALL = Product(FORWARD, "float16", 33, 48, 64)


def test_every_tile_is_asked_for_its_gemm() -> None:
    names = parts.plain_contestants(LARGE, (9, 0))
    shipped = [tile.name for tile in tiles.shipped("bfloat16", (9, 0)) if tile.kind != tiles.DECODE_TILE]
    assert [name for name in names if name.startswith("plain ")] == [f"plain {name}" for name in shipped]
    assert [name for name in names if name.startswith("specialised ")] == [
        f"specialised {tile.name}" for tile in specialised.TILES
    ]
    # One direction has them, and one architecture.
    backward = Product(BACKWARD, "bfloat16", 8192, 4096, 4096)
    assert all(name.startswith("plain ") for name in parts.plain_contestants(backward, (9, 0)))
    assert all(name.startswith("plain pointer-") for name in parts.plain_contestants(LARGE, (8, 0)))


@pytest.fixture
def bench() -> parts.Parts:
    skip_unless_served("triton", "fp16")
    torch.manual_seed(0)
    return parts.Parts(SMALL, find("cpu"))


def test_contestants_are_verified(bench: parts.Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each against its own formula; one that computes something else, or cannot run, takes no part."""
    failures = parts.Failures()
    tile = "tma-64x128x64-4w-4s"
    every = [*parts.plain_contestants(SMALL, (9, 0)), *parts.composed_contestants(tile)]
    for name in every:
        bench.add(name, failures)
    assert failures == parts.Failures()
    assert list(bench.contestants) == [parts.BARE, *every]
    monkeypatch.setattr(bench, "_after", lambda i: bench._first(i) * 1.01)
    monkeypatch.setattr(specialised, "refusal", lambda *arguments: "no such warps")
    for name in (parts.AFTER, f"specialised {tile}"):
        bench.add(name, failures)
    (wrong,) = failures.wrong
    assert f"{parts.AFTER}: y is wrong" in wrong
    assert failures.refused == {f"specialised {tile}": "RuntimeError: no such warps"}


def test_launches_run_without_overlap_where_that_is_named(bench: parts.Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch, "INTERPRETED", False)

    def forward(*arguments: Any) -> tuple[torch.Tensor]:
        seen.append((launch.overlaps(torch.device("cpu")), str(routes.state()[0])))
        return (torch.zeros(()),)

    monkeypatch.setattr(parts.torch.ops.peftkernels, "lora_linear_fwd", SimpleNamespace(triton=forward))
    for end in ("", parts.WITHOUT_OVERLAP):
        bench._build(f"tail tma-64x128x64-4w-4s{end}")(0)
    assert seen == [(True, "tail:tma-64x128x64-4w-4s"), (False, "tail:tma-64x128x64-4w-4s")]
    assert launch.overlaps(torch.device("cpu"))


def _event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU, note: bool = False) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=note)


def test_a_step_is_counted_without_what_follows_it() -> None:
    gpu = DeviceType.CUDA
    found = steps.summary(
        [
            _event(steps.STEP, 0, 100, note=True),
            _event("aten::mm", 1, 5),
            _event("cudaLaunchKernel", 2, 3),
            _event("cudaStreamSynchronize", 6, 20),
            _event("a kernel", 10, 40, gpu),
            _event("Memcpy DtoH", 40, 42, gpu),
            # The device's share of the annotation, and the wait that ends the measurement.
            _event(steps.STEP, 10, 42, gpu, note=True),
            _event("cudaDeviceSynchronize", 101, 120),
        ]
    )
    assert found == steps.Profile(launches=2, waits=1, microseconds=32.0, operators=1)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes of tiny shapes, in a process of its own: it sets how Triton runs."""
    out = tmp_path_factory.mktemp("questions")
    command = [sys.executable, "-m", "bench.gpu.questions", "--smoke", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    assert path.name == "questions-smoke-run-on-the-cpu.json"
    assert done.stdout.rstrip().endswith(f"written: {path}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_everything_is_answered(answers: dict[str, Any]) -> None:
    skip_unless_served("triton", "fp16")
    assert (answers["wrong"], answers["refused"], answers["left_out"]) == ([], {}, {})
    forward, backward = answers["products"]
    kinds = {name.split(" ")[0] for name in forward["ratios"]}
    assert kinds == {"plain", "specialised", "shrink", "shrink,", "tail", "single", "library,"}
    assert len(forward["ratios"]) == 9 and [name.split(" ")[0] for name in backward["ratios"]] == ["plain"]
    (model,) = answers["steps"]
    assert list(model["ratios"]) == steps.contestants()
    assert list(model["profiles"]) == [steps.FROZEN, *steps.contestants()]
    operators = {name: one["operators"] for name, one in model["profiles"].items()}
    assert operators["AdaLoRA, ours"] < operators["LoRA, peft"] < operators["AdaLoRA, peft"]


def _made_up() -> dict[str, Any]:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "p25": median, "p75": median}

    ratios = {
        "plain tma-128x256x64-8w-3s": 1.25, "specialised tma-128x128x64-4w-4s": 1.0, "shrink": 0.05,
        "shrink, library": 0.06, "tail tma-128x256x64-8w-3s": 1.02, "tail tma-128x256x64-8w-3s, without overlap": 1.05,
        "single tma-128x256x64-8w-3s": 1.01, parts.AFTER: 1.09, parts.FIRST: 1.08,
    }  # fmt: skip
    product = {"direction": "forward", "dtype": "bfloat16", "m": 8192, "n": 4096, "k": 4096}
    profiled = {"launches": 1000, "waits": 2, "microseconds": 5000.4, "operators": 3000}
    return {
        "origin": {"device": "NVIDIA H200", "date": "2026-01-02", "commit": "abc"},
        "environment": {"versions": {"torch": "2.11.0", "triton": "3.6.0", "peft": "0.21.2"}},
        "products": [{"product": product, "bare_us": 400.0, "ratios": {n: ratio(r) for n, r in ratios.items()}}],
        "steps": [
            {
                "title": "8 layers",
                "ratios": {n: ratio(r) for n, r in zip(steps.contestants(), (1.5, 1.2, 1.8, 1.23), strict=True)},
                "profiles": dict.fromkeys([steps.FROZEN, *steps.contestants()], profiled),
            }
        ],
        "wrong": ["a product: y is wrong"],
        "refused": {"specialised a": "no such warps"},
        "left_out": {"another": "time ran out"},
    }


def test_the_page_of_the_answers(tmp_path: Path) -> None:
    text = page.page(_made_up())
    rate = "687"  # 2·8192·4096·4096 in 400 µs
    for line in (
        "torch 2.11.0, Triton 3.6.0, peft 0.21.2, 2026-01-02, commit abc.",
        f"| forward | 4096×4096 | 8192 | {rate} | 80.0% | `tma-128x256x64-8w-3s` | 100.0% | `tma-128x128x64-4w-4s` |",
        "| 4096×4096 | 8192 | 400 | 0.050 | 0.060 | 1.020 | 1.050 | +12.0 | 1.010 | 1.090 | 1.080 |",
        "| 8 layers | AdaLoRA, peft | 1.800 | 1,000 | 2 | 5,000 | 3,000 |",
        "| 8 layers | AdaLoRA over LoRA | peft 1.200, ours 1.025 |",
        "Could not run:\n\n- specialised a: no such warps",
        "Left out:\n\n- another: time ran out",
        "WRONG:\n\n- a product: y is wrong",
    ):
        assert line in text
    without = {**_made_up(), "products": [], "steps": [], "wrong": [], "refused": {}, "left_out": {}}
    assert "|" not in page.page(without)
    (tmp_path / "questions-x.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(report.ReportError, match=r"questions-x\.json: cannot be read as answers"):
        report._answers(tmp_path / "questions-x.json")


def test_a_compiler_that_cannot_is_told_from_one_that_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which some releases of Triton end."""
    monkeypatch.setattr(specialised, "INTERPRETED", False)
    outcomes = [
        (0, "", None),
        (1, "a trace\nwarp_specialize was ignored\n", "(exit code 1): warp_specialize was ignored"),
        (-6, "", "(exit code -6): no message"),
    ]
    for code, error, expected in outcomes:
        done = SimpleNamespace(returncode=code, stderr=error)
        monkeypatch.setattr(specialised.subprocess, "run", lambda *_, done=done, **__: done)
        reason = specialised.refusal.__wrapped__(torch.bfloat16, specialised.TILES[0], (9, 0))
        assert reason is None if expected is None else expected in str(reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device: cpu is for --smoke alone"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "found no CUDA device"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.questions", "--out", str(tmp_path / "out"), *arguments],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alive", [True, False])
def test_what_breaks_is_kept_and_a_dead_device_ends_it(
    alive: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(parts, "measure_product", broken)
    monkeypatch.setattr(device, "answers", lambda found: alive)
    answers, kept = command.Answers(), []
    clock = command.Clock(None, 0.0)
    command._ask_products(find("cpu"), True, clock, answers, lambda: kept.append(list(answers.wrong)))
    lines = [
        f"{direction} M=33 N=48 K=64 float16: RuntimeError: an illegal memory access"
        for direction in ("forward", "backward")
    ]
    assert answers.wrong == (lines if alive else lines[:1])
    assert kept[0] == lines[:1]
    assert ("the device no longer answers" in capsys.readouterr().out) != alive
