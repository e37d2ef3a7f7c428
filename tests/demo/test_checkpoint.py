"""Files are whole or old, and a directory is only continued or replaced when that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from demo.checkpoint import TRAINING, Store, write_json
from demo.errors import InputError
from peftkernels._files import write_atomically
from peftkernels.cli.report.collect import ARGUMENTS, RESULTS

GIVEN = {"--seed": 0, "--steps": 30, "recipe": {"lora_rank": 8}}


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_new_directory_is_created_and_holds_the_arguments(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    assert Store(out, GIVEN).open(resume=False) is None
    assert json.loads((out / ARGUMENTS).read_text()) == GIVEN


def test_nothing_to_resume_starts_anew_and_says_so(tmp_path: Path) -> None:
    note = Store(tmp_path / "out", GIVEN).open(resume=True)
    assert note is not None
    assert "nothing to resume" in note


def test_unfinished_demo_is_not_overwritten(tmp_path: Path) -> None:
    Store(tmp_path, GIVEN).open(resume=False)
    with pytest.raises(InputError, match=rf"--out: {tmp_path}: holds an unfinished demo; continue it with --resume"):
        Store(tmp_path, GIVEN).open(resume=False)


def test_finished_demo_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    store.save_finished("lora", {"accuracy": 0.5})
    write_json(tmp_path / RESULTS, {})
    write_atomically(store.decisions("adalora"), lambda file: file.write(b"{}"))
    note = Store(tmp_path, {**GIVEN, "--seed": 1}).open(resume=False)
    assert note is not None
    assert "replacing" in note
    assert not (tmp_path / RESULTS).exists()
    assert store.load_finished("lora") is None
    assert not store.decisions("adalora").exists()
    assert json.loads((tmp_path / ARGUMENTS).read_text())["--seed"] == 1


def test_foreign_directory_and_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty and was not written by 'python -m demo'"):
            Store(tmp_path, GIVEN).open(resume=resume)
    with pytest.raises(InputError, match=r"thesis.tex: is a file"):
        Store(tmp_path / "thesis.tex", GIVEN).open(resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--seed": 1}, r"--resume: --seed is 1, but .* started with 0"),
        ({"--steps": 40}, r"--resume: --steps is 40, but .* started with 30"),
        ({"recipe": {"lora_rank": 4}}, r"--resume: recipe is"),
    ],
)
def test_resume_with_other_arguments_names_the_argument(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    Store(tmp_path, GIVEN).open(resume=False)
    with pytest.raises(InputError, match=message):
        Store(tmp_path, {**GIVEN, **changed}).open(resume=True)


def test_states_come_back_and_a_finished_training_drops_its_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    assert store.load_training() is None
    store.save_training({"weights": torch.arange(3), "step": 10})
    state = store.load_training()
    assert state is not None
    assert state["step"] == 10
    assert torch.equal(state["weights"], torch.arange(3))
    store.save_finished("head", {"accuracy": 0.25})
    assert store.load_training() is None
    assert store.load_finished("head") == {"accuracy": 0.25}


def test_leftovers_of_a_kill_are_removed_by_resume(tmp_path: Path) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    leftover = tmp_path / f".{TRAINING}.123.partial"
    leftover.write_bytes(b"half")
    store.open(resume=True)
    assert not leftover.exists()


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, GIVEN)
    store.open(resume=False)
    (tmp_path / TRAINING).write_bytes(b"PK not a checkpoint")
    with pytest.raises(InputError, match=rf"{TRAINING}: is damaged"):
        store.load_training()
