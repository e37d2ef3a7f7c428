"""HF peft's models, stock and patched, side by side: figures that say what they claim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch

import peftkernels
from bench import peft_backend
from bench.peft_backend import KINDS, WARM_UP, LlamaShape, Row, compare, llama, main

LAYERS, STEPS = 2, 9
# Seven projections in each layer.
ADAPTED = 7 * LAYERS
TINY = LlamaShape(hidden=32, intermediate=48, layers=LAYERS, heads=4, vocabulary=64, rows=2, tokens=8)


@pytest.fixture(autouse=True)
def _one_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_backend, "MODELS", {"tiny": partial(llama, shape=TINY)})


def _after_patching(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """The model that `compare` patches is changed afterwards."""
    apply = peftkernels.apply_to_peft

    def patch(model: Any) -> None:
        apply(model)
        change(model)

    monkeypatch.setattr(peft_backend.peftkernels, "apply_to_peft", patch)


@pytest.mark.parametrize("kind", KINDS)
def test_models_agree_and_everything_is_served(kind: str) -> None:
    row = compare("tiny", kind, 0.0, STEPS)
    assert (row.model, row.kind, row.dropout) == ("tiny", kind, 0.0)
    assert row.gradient_error is not None and 0 < row.gradient_error <= 1e-5
    assert row.loss_distance is not None and row.loss_distance <= 1e-4
    # One more forward pass than there are steps: that of the gradients.
    assert (row.served, row.fell_back) == (ADAPTED * (STEPS + 1), 0)
    if kind == "AdaLoRA":
        assert row.allocation_served is not None and row.allocation_served >= STEPS
        assert row.allocation_fell_back == 0
    else:
        assert (row.allocation_served, row.allocation_fell_back) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_only_speed_and_service_are_told(kind: str) -> None:
    row = compare("tiny", kind, 0.1, STEPS)
    assert (row.gradient_error, row.loss_distance) == (None, None)
    assert (row.served, row.fell_back) == (ADAPTED * STEPS, 0)


def test_dropout_reaches_the_adapters() -> None:
    for kind in KINDS:
        model, _ = llama(kind, 0.25, STEPS, TINY)
        rates = [m.p for name, m in model.named_modules() if name.endswith("lora_dropout.default")]
        assert rates == [0.25] * ADAPTED


def test_a_wrong_factor_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale_one(model: Any) -> None:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.01)

    _after_patching(monkeypatch, scale_one)
    row = compare("tiny", "LoRA", 0.0, STEPS)
    assert row.gradient_error is not None and row.gradient_error > 1e-3
    assert row.loss_distance is not None and row.loss_distance > 1e-6


def test_a_gradient_that_is_no_number_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_last(model: Any) -> None:
        [p for name, p in model.named_parameters() if "lora_B" in name][-1].register_hook(lambda g: g * torch.nan)

    _after_patching(monkeypatch, break_last)
    assert math.isnan(compare("tiny", "LoRA", 0.0, STEPS).gradient_error or 0.0)


def test_calls_that_were_not_served_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook_one(model: Any) -> None:
        layer = next(m for name, m in model.named_modules() if name.endswith("q_proj.base_layer"))
        layer.register_forward_hook(lambda *_: None)

    _after_patching(monkeypatch, hook_one)
    row = compare("tiny", "LoRA", 0.0, STEPS)
    assert (row.served, row.fell_back) == ((ADAPTED - 1) * (STEPS + 1), STEPS + 1)
    assert row.gradient_error is not None and row.gradient_error <= 1e-5


def test_speed_is_stocks_time_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a patched model whose steps are said to last a quarter of stock's."""
    patched: list[Any] = []
    _after_patching(monkeypatch, lambda model: patched.append(model.base_model))
    step = peft_backend.Training.step

    def timed(self: peft_backend.Training, inputs: peft_backend.Inputs) -> float:
        step(self, inputs)
        return (1 if self.model is patched[0] else 4) * (1 + len(self.losses)) * 1e-3

    monkeypatch.setattr(peft_backend.Training, "step", timed)
    monkeypatch.setattr(peft_backend, "ForeignLoad", _Loads([0.0] * (STEPS - 1) + [0.5]))
    row = compare("tiny", "LoRA", 0.0, STEPS)
    assert (row.speed, row.speed_p25, row.speed_p75) == pytest.approx((4, 4, 4))
    # Steps 6 to 8 count: the first five fill caches, and the ninth was disturbed.
    assert (row.rounds, row.discarded, row.disturbed) == (STEPS - WARM_UP - 1, 1, False)
    assert (row.milliseconds, row.stock_milliseconds) == pytest.approx((8, 32))


class _Loads:
    """Stands for `ForeignLoad`: other processes' shares in a given order."""

    def __init__(self, shares: list[float]) -> None:
        self._shares = iter(shares)

    def __call__(self) -> _Loads:
        return self

    def __enter__(self) -> _Loads:
        self.share = next(self._shares)
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_command_prints_and_keeps_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr(peft_backend, "MOST_STEPS_WITH_DROPOUT", STEPS - 1)
    main(["--steps", str(STEPS), "--json", str(path)])
    printed = capsys.readouterr().out
    assert all(f" {kind} " in printed and f" {kind}, dropout 0.1 " in printed for kind in KINDS)
    kept = json.loads(path.read_text())
    assert list(kept) == ["date", "commit", "versions", "machine", "threads", "rows"]
    assert {"torch", "peft", "transformers", "peftkernels"} <= kept["versions"].keys()
    assert "system" not in kept["machine"] and kept["machine"]["processor"]
    assert kept["threads"] == torch.get_num_threads()
    names = [field.name for field in fields(Row)]
    assert all(list(row) == names for row in kept["rows"])
    cases = [(row["kind"], row["dropout"], row["steps"]) for row in kept["rows"]]
    assert cases == [(kind, dropout, n) for dropout, n in ((0.0, STEPS), (0.1, STEPS - 1)) for kind in KINDS]
    assert all(asdict(Row(**row)) == row for row in kept["rows"])
    # The report is tested on made-up figures: they have the same form.
    made = made_up.peft_backend()
    assert made.keys() == kept.keys() and made["rows"][0].keys() == kept["rows"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "7"], "--steps: found 7, expected at least 8"), (["--json", "none/x.json"], "found no folder none")],
)
def test_what_cannot_be_is_refused_at_once(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peft_backend, "compare", None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
