"""The example of a training on several processes, started as its user starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from demo.errors import InputError

SECONDS = 240


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.rootpath) / "examples" / "train_torchrun.py"


def loaded(example: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_torchrun", example)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_two_processes_train_and_agree(example: Path, tiny_model: Path, tiny_data: Path) -> None:
    small = ["--quick", "--steps", "20", "--batch-size", "16", "--model", str(tiny_model), "--data", str(tiny_data)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "examples.train_torchrun", *small],
        cwd=example.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=SECONDS)
    except BaseException:
        # The launcher's children do not end with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, error
    *steps, summary = out.splitlines()
    assert [line.split(":")[0] for line in steps] == [f"step {step}" for step in range(2, 21, 2)]
    found = re.fullmatch(
        r"2 processes, 20 steps of 16 texts, \d+ s: test accuracy (\d\.\d+), (\d+) of (\d+) ranks kept; "
        "masks, gates and scores agree on all processes",
        summary,
    )
    assert found is not None, summary
    # Six linear modules in each of two layers, at the recipe's ranks; three classes.
    assert (int(found[2]), int(found[3])) == (8 * 12, 12 * 12)
    assert float(found[1]) > 0.5


def test_a_batch_that_cannot_be_shared_out_is_refused(example: Path) -> None:
    module = loaded(example)
    with pytest.raises(InputError, match="--batch-size: found 15, expected a multiple of 2 processes"):
        module.read(module.parse(["--quick", "--batch-size", "15"]), 2)
