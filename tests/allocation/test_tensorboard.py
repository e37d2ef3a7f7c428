"""TensorBoard's scalars are those of the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.made_up_run import Heard, MadeUpRun

from peftkernels.allocation import DecisionLog, Observer, TensorBoardScalars, read_log


class Writer:
    """What TensorBoardScalars needs of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, {})[step] = value


def test_observers_have_the_protocol(tmp_path: Path) -> None:
    assert isinstance(DecisionLog(tmp_path / "log.jsonl"), Observer)
    assert isinstance(TensorBoardScalars(Writer()), Observer)
    assert not isinstance(Writer(), Observer)


def test_scalars_are_those_of_the_log(tmp_path: Path) -> None:
    run, writer = MadeUpRun(steps=20, modules=6, rollback=(12, 8)), Writer()
    run.feed([TensorBoardScalars(writer), DecisionLog(tmp_path / "log.jsonl")])
    log = read_log(tmp_path / "log.jsonl")
    scalars = writer.scalars
    assert list(scalars["allocation/live"].values()) == log.kept.sum(1).tolist()
    assert list(scalars["allocation/budget"].values()) == log.budgets.tolist()
    assert list(scalars["allocation/threshold/mlp"].values()) == log.thresholds[:, 2].tolist()
    mlp = np.concatenate([log.kept[:, log.part(index)] for index in (2, 5)], axis=1)
    assert list(scalars["allocation/live/mlp"].values()) == mlp.sum(1).tolist()
    flips = log.kept[1:] != log.kept[:-1]
    back = log.kept[1:] & ~log.kept[:-1]
    for step in (10, 14):  # decisions that directly follow the one before in the log's arrays
        row = log.steps.tolist().index(step) - 1
        assert scalars["allocation/churn"][step] == flips[row].sum()
        assert scalars["allocation/revived"][step] == back[row].sum()
    assert scalars["allocation/skipped"] == {3: 1}
    assert scalars["allocation/rollbacks"] == {12: 1}


def test_scalars_of_a_resumed_run_invent_no_churn() -> None:
    run, writer = MadeUpRun(steps=20), Writer()
    run.feed([TensorBoardScalars(writer)], first=7)
    assert 8 in writer.scalars["allocation/live"]
    assert min(writer.scalars["allocation/churn"]) == 9


def test_tensorboard_reads_them_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the check of the files needs tensorboard installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    run, heard = MadeUpRun(steps=20), Heard()
    with SummaryWriter(str(tmp_path)) as writer:
        run.feed([heard, TensorBoardScalars(writer)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    live = [(event.step, event.value) for event in events.Scalars("allocation/live")]
    assert live == [(told[0], float(np.sum(told[4]))) for told in heard.decisions]


def test_a_writer_without_add_scalar_is_refused() -> None:
    with pytest.raises(TypeError, match=r"writer: found str.*pip install 'peftkernels\[tensorboard\]'"):
        TensorBoardScalars("runs/one")
