"""Installs a wheel where nothing is but torch and what torch needs, and uses it there.

    python .ci/smoke.py dist/peftkernels-*.whl

The environment is a new one; torch, Triton and what they ask for are linked into it from this interpreter's. pip
installs the wheel without a network, so that it fails where the wheel asks for anything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

CALLS = Path(__file__).with_name("smoke_calls.py")
NEEDED = ("torch", "triton")


def distributions(*names: str) -> dict[str, Requirement]:
    """Installed distributions of these names, and what they ask for in turn, by name."""
    found: dict[str, Requirement] = {}
    asked = [Requirement(name) for name in names]
    while asked:
        one = asked.pop()
        if one.name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found[one.name] = one
            asked += map(Requirement, distribution(one.name).requires or ())
    return found


def top_level(name: str) -> Iterator[Path]:
    """Files and folders of a distribution that lie in site-packages itself."""
    site = Path(str(distribution(name).locate_file("")))
    names = {file.parts[0] for file in distribution(name).files or ()}
    return (site / one for one in names if one not in ("..", "__pycache__"))


def environment(folder: Path) -> Path:
    """Make the environment; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    for name in distributions(*(name for name in NEEDED if installed(name))):
        for path in top_level(name):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return python


def installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def run(*command: str | Path, cwd: str | None = None) -> str:
    """Standard output of a command, which must succeed."""
    # Neither PYTHONPATH nor settings of the package's.
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=plain, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"smoke: {' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def smoke(wheel: Path) -> str:
    """Install and use the wheel; returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "environment")
        pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")
        run(*pip, "install", "--no-index", wheel)
        doctor = run(python.with_name("peftkernels"), "doctor", cwd=folder)
        return doctor + run(python, "-I", CALLS, cwd=folder)


if __name__ == "__main__":
    print(smoke(Path(sys.argv[1]).resolve()), end="")
