"""The wheel holds the package and nothing beside it, and works where nothing is but torch and what torch needs."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peftkernels

ROOT = Path(__file__).parents[1]
SMOKE = runpy.run_path(str(ROOT / ".ci" / "smoke.py"))
# What a build reads, beside the sources.
BUILD = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build may look at: it leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("peftkernels", "csrc", "bench", "demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in BUILD:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the kernels that this checkout has, since compiling them takes minutes."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", source]
    subprocess.run([*build, "--wheel-dir", folder], env={**os.environ, "PEFTKERNELS_BUILD": "off"}, check=True)
    (built,) = folder.glob("*.whl")
    kernels = list(Path(peftkernels.__file__).parent.glob("_C*.so"))
    if kernels:
        subprocess.run([sys.executable, "-m", "wheel", "unpack", built, "--dest", folder / "unpacked"], check=True)
        (unpacked,) = (folder / "unpacked").iterdir()
        for path in kernels:
            shutil.copy(path, unpacked / "peftkernels")
        subprocess.run([sys.executable, "-m", "wheel", "pack", unpacked, "--dest-dir", folder], check=True)
    return built


@pytest.mark.alone
def test_the_wheel_holds_the_package_and_asks_for_torch_and_triton(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    assert {name.partition("/")[0] for name in names} == {"peftkernels", metadata.partition("/")[0]}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "peftkernels").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    data = {"page.css", "page.html.j2"} | {path.name for path in (ROOT / "peftkernels").rglob("configs/*")}
    assert data <= {Path(name).name for name in names}
    always = [one for one in map(Requirement, required) if "extra" not in str(one.marker)]
    assert {one.name for one in always} == {"torch", "triton"}


@pytest.mark.alone
@pytest.mark.skipif(os.name != "posix", reason="the environment is made of symbolic links")
def test_the_wheel_works_by_itself(wheel: Path) -> None:
    printed = SMOKE["smoke"](wheel)
    assert "peftkernels can serve calls" in printed
    assert "one step of AdaLoRA: 6 of 12 ranks kept" in printed
    has_kernels = bool(list(Path(peftkernels.__file__).parent.glob("_C*.so")))
    assert ("\n  cpu           runs" in printed) == has_kernels
    assert f"imported from {ROOT}" not in printed


@pytest.mark.alone
def test_the_source_distribution_holds_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=source, env={**os.environ, "PEFTKERNELS_BUILD": "off"}, check=True)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert wanted <= names and {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    assert not {name.partition("/")[0] for name in names} & {"bench", "demo", "tests"}
