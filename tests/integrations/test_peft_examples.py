"""The examples on HF peft, on a model that is given and on none that has to be downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.peft_models import llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("example", "options", "expected"),
    [
        ("peft_lora.py", [], ["56 of 56 adapter calls served (100 %)"]),
        ("peft_lora.py", ["--dora", "--dropout", "0.1"], ["56 of 56 adapter calls served (100 %)"]),
        ("own_loop.py", [], ["ranks kept at the end: 56 stock, 56 patched", "56 of 56 adapter calls served (100 %)"]),
        (
            "peft_adalora_trainer.py",
            [],
            [
                "56 ranks kept at the end",
                "56 of 56 adapter calls served",
                "calls of AdaLoRA's allocation served (100 %)",
            ],
        ),
    ],
)
def test_it_says_what_was_served_and_how_fast(
    example: str, options: list[str], expected: list[str], model: Path, request: pytest.FixtureRequest
) -> None:
    root = Path(request.config.rootpath)
    ran = subprocess.run(
        [sys.executable, root / "examples" / example, "--model", model, "--steps", "4", "--tokens", "8", *options],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "14 of 14 adapted modules are served by peftkernels" in ran.stdout
    assert "peftkernels is " in ran.stdout and " times as fast" in ran.stdout
    assert all(text in ran.stdout for text in expected), ran.stdout
