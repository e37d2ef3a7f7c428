"""The exact versions that were tested together, as a file of constraints for pip.

- `python .ci/versions.py write` prints those of this environment, kept back by TORCH and HOLD (Makefile).
- `python .ci/versions.py check FILE` says so when the file is for another Python than this one.
- `python .ci/versions.py triton FILE` prints its line of Triton, unless this environment's torch asks for a release.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path

PYTHON = ".".join(map(str, sys.version_info[:2]))
# pip itself makes no difference, and what CUDA builds of torch bring is pinned by torch.
_LEFT_OUT = ("pip==", "nvidia-", "cuda-", "#", "-e ", "peftkernels")
# What the kernels are built against: the same release for every Python.
_EVERYWHERE = ("torch==", "triton==")
_HEADER = """\
# Every package, with what it needs in turn, in the version that all tests passed with on Python {python}, {platform}.
# Written by: make upgrade{options}
# Other versions of Python get this torch and the newest releases of all else that pyproject.toml allows.
"""


def constraints(frozen: str, options: Mapping[str, str]) -> str:
    """The file's text from what `pip freeze --all` printed.

    A local version label (2.13.0+cpu) names a build of the same release: without it every build satisfies the line.
    """
    given = "".join(f' {name}="{value}"' for name, value in options.items() if value)
    header = _HEADER.format(python=PYTHON, platform=sys.platform, options=given)
    names = [line.partition("+")[0] for line in frozen.splitlines() if line and not line.startswith(_LEFT_OUT)]
    marker = f' ; python_version == "{PYTHON}"'
    return header + "".join(f"{name}{'' if name.startswith(_EVERYWHERE) else marker}\n" for name in names)


def another_python(text: str) -> str | None:
    """What to tell who installs by a file of constraints of another Python; None where there is nothing to tell."""
    if not text or f'python_version == "{PYTHON}"' in text:
        return None
    tested = text.partition("on Python ")[2].partition(",")[0]
    return f"constraints.txt is for Python {tested}; {PYTHON} gets its torch, and the newest releases of all else"


def main(command: str, *arguments: str) -> None:
    if command == "write":
        freeze = [sys.executable, "-m", "pip", "--disable-pip-version-check", "freeze", "--all"]
        frozen = subprocess.run(freeze, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(constraints(frozen, {name: os.environ.get(name, "") for name in ("TORCH", "HOLD")}), end="")
    elif command == "triton":
        asked = any(one.startswith("triton") for one in requires("torch") or ())
        lines = Path(arguments[0]).read_text().splitlines()
        print("".join(f"{line}\n" for line in lines if line.startswith("triton==") and not asked), end="")
    elif note := another_python(Path(arguments[0]).read_text()):
        print(note, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
