"""What the library says can be printed wherever a user prints it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peftkernels

PACKAGE = Path(peftkernels.__file__).parent
# Commands print for their own process, which escapes what the console does not have (cli/process.py).
COMMANDS = (PACKAGE / "cli",)
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if not any(one in path.parents for one in COMMANDS)]


def _strings(path: Path) -> Iterator[ast.Constant]:
    """Every string of a module but its docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def test_reports_reasons_and_errors_are_ascii() -> None:
    """`print(peftkernels.stats(model))` on a console without UTF-8 ended in a UnicodeEncodeError."""
    assert len(MODULES) > 100
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value!r}"
        for path in MODULES
        for node in _strings(path)
        if not str(node.value).isascii()
    ]
    assert not found, "\n".join(found)


def test_commands_print_to_a_console_without_utf_8(tmp_path: Path) -> None:
    """A path comes back in the error, escaped."""
    done = subprocess.run(
        [sys.executable, "-c", "from peftkernels.cli.process import prepare_process\n"
         "prepare_process()\n"
         "print('1.02 × frozen, ΔT')"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.02 \\xd7 frozen, \\u0394T\n"
