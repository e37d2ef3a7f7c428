"""A decision log holds what was decided, survives a kill anywhere, and after a resume is that of an unbroken run."""

from __future__ import annotations

import copy
import errno
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Base, adapt, trainable
from support.made_up_run import Heard, MadeUpRun

from peftkernels.allocation import AdaLoraAllocator, DecisionLog, read_log
from peftkernels.allocation.logs.log_lines import LogError


def whole_log(path: Path, run: MadeUpRun, every: int = 1) -> bytes:
    with DecisionLog(path, every) as log:
        run.feed([log])
    return path.read_bytes()


def test_what_is_read_is_what_was_told(tmp_path: Path) -> None:
    run, heard = MadeUpRun(modules=5, steps=30), Heard()
    run.feed([heard, DecisionLog(tmp_path / "log.jsonl")])
    log = read_log(tmp_path / "log.jsonl")
    assert not log.torn
    assert (log.strategy, log.unit, log.first_step, log.last_step) == ("adalora", "ranks", 0, 30)
    assert log.facts["settings"] == run.facts()["settings"]
    assert [(m.name, m.rank, m.in_features, m.out_features, m.cost) for m in log.modules] == [
        (name, 4, 32, 64, 1.0) for name in run.names
    ]
    assert [m.group for m in log.modules] == ["attention", "attention", "mlp", "attention", "attention"]
    assert len(heard.decisions) == len(log.decisions) == 18
    for (step, budget, thresholds, scores, kept), read in zip(heard.decisions, log.decisions, strict=True):
        assert (read.step, read.budget) == (step, budget)
        np.testing.assert_array_equal(read.thresholds, thresholds)
        np.testing.assert_array_equal(read.scores, np.ravel(scores))
        np.testing.assert_array_equal(read.kept, np.ravel(kept))
    assert [(e.step, e.kind, e.details) for e in log.events] == heard.events
    pattern = dict(zip(run.names, heard.decisions[-1][4], strict=True))
    assert log.rank_pattern() == pattern
    assert log.scores.shape == log.kept.shape == (18, 20)
    assert log.thresholds.shape == (18, 5)


def test_lines_are_plain_json_with_the_promised_fields(tmp_path: Path) -> None:
    whole_log(tmp_path / "log.jsonl", MadeUpRun(modules=2, steps=10))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    assert [line["event"] for line in lines].count("start") == 1
    ranks = [line for line in lines if line["event"] == "ranks"]
    assert all(set(line) == {"event", "step", "module", "scores", "threshold", "kept", "budget"} for line in ranks)
    assert {"event": "loss", "step": 4, "value": 0.5} in lines


def test_infinite_and_missing_numbers_survive(tmp_path: Path) -> None:
    run = MadeUpRun(modules=1, rank=3)
    log = DecisionLog(tmp_path / "log.jsonl")
    log.on_start(run.facts())
    log.on_decision(1, 3.0, [-math.inf], [[math.inf, math.nan, 0.1]], [[True, True, True]])
    log.on_event(1, "loss", {"value": math.nan})
    read = read_log(tmp_path / "log.jsonl")
    assert read.thresholds[0, 0] == -math.inf
    np.testing.assert_array_equal(read.scores[0], [math.inf, math.nan, 0.1])
    assert read.events[0].details == {"value": "nan"}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("rollback", [None, (13, 9)])
def test_resumed_anywhere_after_any_tear_equals_the_uninterrupted(
    tmp_path: Path, seed: int, every: int, rollback: tuple[int, int] | None
) -> None:
    draw = random.Random(seed)
    run = MadeUpRun(modules=4, steps=24, seed=seed, rollback=rollback)
    expected = whole_log(tmp_path / "whole.jsonl", run, every)
    for attempt in range(25):
        path = tmp_path / f"{attempt}.jsonl"
        checkpoint = (0, 0)
        first = DecisionLog(path, every)
        stop = draw.randint(1, 23)
        checkpoint = run.feed([first], last=stop)
        # The run goes on after its checkpoint, and is killed while it writes.
        beyond = draw.randint(stop, 24)
        run.feed([Mute(first)], *[checkpoint[0], beyond, checkpoint[1]])
        written = path.read_bytes()
        safe = len(_up_to(path, checkpoint))
        path.write_bytes(written[: draw.randint(safe, len(written))])
        with DecisionLog(path, every) as second:
            run.feed([second], checkpoint[0], rollbacks=checkpoint[1])
        assert path.read_bytes() == expected, (attempt, stop, beyond)
    assert [p.name for p in tmp_path.glob(".*")] == []


class Mute:
    """Passes on all but the start, as to an observer of a run that was not interrupted."""

    def __init__(self, log: DecisionLog) -> None:
        self.on_decision, self.on_event = log.on_decision, log.on_event

    def on_start(self, facts: Any) -> None:
        pass


def _up_to(path: Path, checkpoint: tuple[int, int]) -> bytes:
    """The part of a log that a checkpoint's sync() made durable."""
    kept, step, rollbacks = b"", 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        content = json.loads(line)
        rollbacks += content["event"] == "rollback"
        step = content["to"] if content["event"] == "rollback" else content["step"]
        if (rollbacks, step) <= (checkpoint[1], checkpoint[0]):
            kept += line
    return kept


def test_without_a_count_the_newest_timeline_is_continued(tmp_path: Path) -> None:
    run = MadeUpRun(steps=20, rollback=(12, 8))
    expected = whole_log(tmp_path / "whole.jsonl", run)
    for step, rollbacks in ((9, 1), (13, 1), (5, 0), (20, 1)):
        path = tmp_path / f"{step}.jsonl"
        path.write_bytes(expected)
        log = DecisionLog(path)
        facts = run.facts(step)
        del facts["rollbacks"]
        log.on_start(facts)
        run.feed([Mute(log)], step, rollbacks=rollbacks)
        assert path.read_bytes() == expected


def test_loading_a_state_after_the_log_was_added_loses_nothing(tmp_path: Path) -> None:
    run = MadeUpRun(steps=20)
    path = tmp_path / "log.jsonl"
    expected = whole_log(path, run)
    log = DecisionLog(path)
    log.on_start(run.facts(0))  # the allocator was just made
    assert path.read_bytes() == expected
    run.feed([log], first=10)  # its state was loaded
    assert path.read_bytes() == expected


def test_reader_leaves_out_what_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = whole_log(path, MadeUpRun(modules=3, steps=10))
    start = content.index(b"\n") + 1
    counted = set()
    for end in range(start, len(content) + 1, 7):
        path.write_bytes(content[:end])
        log = read_log(path)
        whole = content[:end].endswith(b"\n") and content[:end].count(b'"event": "ranks"') % 3 == 0
        assert log.torn != whole, end
        assert all(decision.kept.size == 12 for decision in log.decisions)
        counted.add(len(log.decisions))
    assert counted == set(range(7))


def test_start_alone_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole_log(path, MadeUpRun(modules=2, steps=10))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    log = read_log(path)
    assert len(log.decisions) == len(log.events) == log.last_step == 0
    assert log.scores.shape == log.kept.shape == (0, 8)
    assert log.rank_pattern() == {name: [True] * 4 for name in MadeUpRun(modules=2).names}


def test_every_thins_the_scores_and_nothing_else(tmp_path: Path) -> None:
    run = MadeUpRun(steps=30, rank=12)
    thick, thin = (whole_log(tmp_path / f"{every}.jsonl", run, every) for every in (1, 5))
    assert len(thin) < 0.7 * len(thick)
    full, read = read_log(tmp_path / "1.jsonl"), read_log(tmp_path / "5.jsonl")
    assert [d.step for d in read.decisions if d.scored] == [4, 9, 14, 19]
    assert read.facts["every"] == 5
    np.testing.assert_array_equal(read.kept, full.kept)
    np.testing.assert_array_equal(read.thresholds, full.thresholds)
    for row, decision in enumerate(read.decisions):
        expected = full.scores[row] if decision.scored else np.full(72, np.nan)
        np.testing.assert_array_equal(read.scores[row], expected)


def test_rolled_back_decisions_are_marked_and_left_out_of_the_arrays(tmp_path: Path) -> None:
    run = MadeUpRun(steps=20, rollback=(12, 8))
    whole_log(tmp_path / "log.jsonl", run)
    log = read_log(tmp_path / "log.jsonl")
    assert [d.step for d in log.decisions if d.undone] == [9, 10, 11, 12]
    assert log.steps.tolist() == [*range(3, 15)]
    assert [e.step for e in log.events if e.kind == "loss" and e.undone] == [9, 10, 11, 12]
    assert log.last_step == 20


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (1, lambda line: {**line, "format": 9}, "found format 9, expected 1"),
        (1, lambda line: {**line, "modules": []}, r"found modules \[\], expected a list of at least one"),
        (1, lambda line: {**line, "event": "loss"}, "found the event 'loss', expected the start"),
        (1, lambda line: {**line, "modules": line["modules"] + line["modules"][:1]}, "found a module's name twice"),
        (2, lambda line: {**line, "step": "two"}, "step: found 'two', expected a whole number"),
        (2, lambda line: [1, 2], r"found \[1, 2\], expected a JSON object"),
        (6, lambda line: {**line, "module": "other"}, "found the ranks of 'other' at step 3, expected those of"),
        (7, lambda line: {**line, "event": "loss"}, "found the event 'loss', expected the ranks of"),
        (6, lambda line: {**line, "kept": [True]}, r"found kept \[True\], expected a list of 4"),
        (6, lambda line: {**line, "kept": [1, 0, 1, 0]}, "expected true or false for each rank"),
        (6, lambda line: {**line, "scores": ["a", 1, 1, 1]}, "found 'a', expected a number"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: int, change: Any, message: str) -> None:
    path = tmp_path / "log.jsonl"
    whole_log(path, MadeUpRun(modules=2, steps=20))
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(change(json.loads(lines[line - 1])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LogError, match=f"{path}, line {line}: .*{message}"):
        read_log(path)


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = whole_log(path, MadeUpRun())
    path.write_bytes(content.replace(b'"step": 2,', b'"step": 2', 1))
    with pytest.raises(LogError, match=f"{path}, line 3: found no JSON"):
        read_log(path)
    path.write_bytes(b"")
    with pytest.raises(LogError, match="found no start"):
        read_log(path)


def test_another_runs_log_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = whole_log(path, MadeUpRun(strategy="adalora"))
    with pytest.raises(LogError, match="holds the log of another run, with other strategy; expected the same run's"):
        MadeUpRun(strategy="bandit").feed([DecisionLog(path)])
    with pytest.raises(LogError, match="with other every"):
        MadeUpRun().feed([DecisionLog(path, every=2)])
    assert path.read_bytes() == content
    for foreign in (b"precious\n", b"precious"):
        path.write_bytes(foreign)
        with pytest.raises(LogError, match="line 1"):
            MadeUpRun().feed([DecisionLog(path)])
        assert path.read_bytes() == foreign


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every: found 0, expected at least 1"):
        DecisionLog(tmp_path / "log.jsonl", every=0)
    with pytest.raises(TypeError, match="every: found True"):
        DecisionLog(tmp_path / "log.jsonl", every=True)
    with pytest.raises(ValueError, match="path: found the directory"):
        DecisionLog(tmp_path)
    log = DecisionLog(tmp_path / "log.jsonl")
    with pytest.raises(RuntimeError, match="was not started"):
        log.on_event(1, "loss", {"value": 1.0})
    log.on_start(MadeUpRun(modules=2).facts())
    with pytest.raises(ValueError, match="scores: found 1 modules, expected 2"):
        log.on_decision(1, 4.0, [0.1, 0.1], [[1.0] * 4], [[True] * 4] * 2)
    with pytest.raises(ValueError, match="kind 'ranks'"):
        log.on_event(1, "ranks", {})
    with pytest.raises(ValueError, match=r"details with \['step'\]"):
        log.on_event(1, "moved", {"step": 3})
    with pytest.raises(TypeError, match="expected plain numbers"):
        log.on_event(1, "moved", {"what": torch.ones(1)})


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    run = MadeUpRun(steps=20)
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)
    run.feed([log], last=5)
    whole = path.read_bytes()
    log._file = Filling(log._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.on_event(6, "loss", {"value": 1.0})
    assert path.read_bytes() == whole
    assert read_log(path).last_step == 5


class Filling:
    """A file on a disk that has room for ten bytes more."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._room = 10

    def fileno(self) -> int:
        return int(self._file.fileno())

    def write(self, content: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written, self._room = self._file.write(content[: self._room]), 0
        return int(written)

    def close(self) -> None:
        self._file.close()


def train(path: Path, steps: int, state: Any = None, skip_at: int | None = None) -> Any:
    """A small model under an AdaLoRA allocator with a log, from ``state`` to step ``steps``; returns its state."""
    torch.manual_seed(0)
    model = adapt(Base())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator = AdaLoraAllocator(model, total_step=20, target_r=3, tinit=3, tfinal=5, deltaT=2)
    log = DecisionLog(path)
    allocator.add_observer(log)
    if state is not None:
        for part, saved in zip((model, optimizer, allocator), state, strict=True):
            part.load_state_dict(copy.deepcopy(saved))
    allocator.attach(optimizer)
    draw = torch.Generator()
    for step in range(allocator.steps + 1, steps + 1):
        draw.manual_seed(step)
        x, target = torch.randn(2, 8, 24, generator=draw)
        loss = model(x, target).loss
        allocator.observe(loss)
        (loss + allocator.regularization()).backward()
        if step == skip_at:
            model.second.lora_E.grad[0] = math.nan
            with pytest.warns(UserWarning, match="not finite"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    log.close()
    return tuple(part.state_dict() for part in (model, optimizer, allocator)), allocator


def test_allocators_log_is_whole_resumed_and_true(tmp_path: Path) -> None:
    _, allocator = train(tmp_path / "whole.jsonl", 20)
    saved, _ = train(tmp_path / "log.jsonl", 9)
    train(tmp_path / "log.jsonl", 14, saved)
    train(tmp_path / "log.jsonl", 20, saved)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    log = read_log(tmp_path / "log.jsonl")
    assert log.steps.tolist() == [4, 6, 8, 10, 12, 14, 15]
    assert log.rank_pattern() == allocator.rank_pattern()
    for index, module in enumerate(allocator.explain().modules):
        np.testing.assert_array_equal(log.scores[-1, log.part(index)], module.scores)
        assert log.thresholds[-1, index] == module.threshold
    assert [event.step for event in log.events if event.kind == "loss"] == [*range(1, 21)]
    assert log.last_step == 20


def test_skipped_steps_are_logged(tmp_path: Path) -> None:
    train(tmp_path / "log.jsonl", 4, skip_at=4)
    skipped = [event for event in read_log(tmp_path / "log.jsonl").events if event.kind == "skipped"]
    assert [event.step for event in skipped] == [4]
    assert "not finite" in skipped[0].details["why"]


def test_an_overflow_belongs_to_the_step_that_is_tried_again(tmp_path: Path) -> None:
    """Told of the step before, it would survive the resume from a checkpoint made there, and be logged twice."""
    model = adapt(Base())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    allocator = AdaLoraAllocator(model, total_step=20, target_r=3)
    allocator.add_observer(DecisionLog(tmp_path / "log.jsonl"))
    allocator.attach(optimizer)
    for overflow in (0.0, 1.0, 0.0):
        model(*torch.randn(2, 8, 24)).loss.backward()
        # As a GradScaler does for the time of its step.
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(overflow)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
    log = read_log(tmp_path / "log.jsonl")
    assert [(event.step, event.kind) for event in log.events] == [(2, "skipped")]
    assert "overflow" in log.events[0].details["why"]
    assert log.steps.tolist() == [1, 2]
