"""A demo whose files were damaged is refused with the file's name when it is resumed, or goes on to its end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from demo import job
from demo.checkpoint import TRAINING, Store
from demo.command import main
from demo.compare.job import ComparisonStore
from demo.compare.settings import Setting, Trial
from demo.errors import InputError
from demo.train import Record
from peftkernels.cli.report.collect import ARGUMENTS

GIVEN = {"--seed": 0}


def _record() -> Record:
    return Record(
        "lora",
        ["a"],
        losses=[1.0, 0.5],
        total_losses=[1.0, 0.5],
        live_ranks=[[2], [1]],
        milliseconds=[1.0, 2.0],
        weights={"a": torch.randn(40, 50)},
        masks={"a": [True, False]},
        accuracy=0.5,
    )


@pytest.mark.parametrize("name", ["training", "finished"])
def test_damaged_checkpoints_are_refused_by_name_or_what_they_were(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    store.save_finished("lora", _record().as_dict())
    store.save_training(_record().as_dict())
    path = store.finished_path("lora") if name == "finished" else store.training_path
    whole = path.read_bytes()
    refused = 0
    for turn in range(400):
        draw = random.Random(turn)
        place = draw.randrange(len(whole))
        changed = whole[:place] + (b"" if turn % 4 == 0 else bytes([draw.randrange(256)]) + whole[place + 1 :])
        path.write_bytes(changed)
        try:
            found: Any = store.load_finished("lora") if name == "finished" else store.load_training()
            record = Record.of(found, path)
        except InputError as error:
            refused += 1
            if f"--resume: {path}" not in str(error):
                pytest.fail(f"byte {place}: {error}")
            continue
        # A byte that nothing is made of.
        assert torch.equal(record.weights["a"], torch.load(_again(tmp_path, whole))["weights"]["a"]), turn
    assert refused > 200


def _again(folder: Path, content: bytes) -> Path:
    path = folder / "whole.pt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff", b'{"--seed": '])
def test_damaged_arguments_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    (tmp_path / ARGUMENTS).write_bytes(content)
    with pytest.raises(InputError, match=rf"--resume: {tmp_path / ARGUMENTS}: is damaged and cannot be loaded"):
        store.open(resume=True)


def test_a_damaged_training_of_a_comparison_is_refused_by_name_and_field(tmp_path: Path) -> None:
    store = ComparisonStore(tmp_path, {})
    trial = Trial("adalora", 0, Setting(3e-3, 4.0, 2, 1))
    numbers = ("labels", "live_ranks", "total_ranks", "live_parameters", "trainable_parameters")
    seconds = ("accuracy", "training_processor_seconds", "evaluation_processor_seconds")
    whole = {"trial": trial.as_dict(), "losses": [1.0], "live_ranks_by_module": {"a": 1}}
    whole |= dict.fromkeys(numbers, 1) | dict.fromkeys(seconds, 0.5)
    store.path(trial).parent.mkdir()
    store.path(trial).write_text(json.dumps(whole))
    assert store.load(trial) is not None
    for field in whole:
        for value in (None, "x", [None], -1, float("nan")):
            if field in seconds and value == -1:
                continue
            store.path(trial).write_text(json.dumps({**whole, field: value}))
            with pytest.raises(
                InputError, match=rf"--resume: {store.path(trial)}: .*{'training' if field == 'trial' else field}"
            ):
                store.load(trial)


def test_a_checkpoint_of_another_program_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    for content in ([1, 2], {"name": "lora"}, {"name": "lora", "record": {}}):
        torch.save(content, tmp_path / TRAINING)
        with pytest.raises(InputError, match=rf"--resume: {tmp_path / TRAINING}"):
            Record.of((store.load_training() or {}).get("record"), tmp_path / TRAINING)


@pytest.mark.parametrize("more", [[], ["--allocators", "all"]])
@pytest.mark.parametrize("inside", [False, True])
def test_an_out_that_is_a_file_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], inside: bool
) -> None:
    def worked(*arguments: Any) -> None:
        raise AssertionError("texts and model were prepared first")

    monkeypatch.setattr(job, "prepare", worked)
    monkeypatch.setattr("demo.compare.job.prepared_for", worked)
    file = tmp_path / "file"
    file.write_text("precious")
    assert main([*more, "--out", str(file / "inside" if inside else file)]) == 2
    assert f"--out: {file}: is a file; expected a directory" in capsys.readouterr().err
    assert file.read_text() == "precious"
