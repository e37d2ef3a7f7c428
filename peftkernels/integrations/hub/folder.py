"""The folder of a kernel on the Hugging Face Hub, written from the package.

A kernel is imported from its folder under a name of its own, several versions of it beside each other. So in the copy
every import of the package is relative, and operators are registered in a namespace that belongs to the copy's
contents; nothing else differs. Source: https://huggingface.co/docs/kernels/kernel-requirements, read for kernels 0.17.

- FOLDER/build.toml: the repository's, which kernel-builder reads.
- FOLDER/torch-ext/peftkernels/: the copy, which kernel-builder builds.
- FOLDER/build/torch-<backend>/: the copy as it is loaded, ``kernels.get_local_kernel(FOLDER)``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from peftkernels.integrations.hub.source import GENERATED, NAME, rewritten

PACKAGE = Path(__file__).parents[2]
# The command line belongs to an installation, and the rest is this tool.
LEFT_OUT = ("__main__.py", "cli", "integrations/hub")
# What kernel-builder writes for a package without dependencies: the first release that reads such metadata.
OLDEST_KERNELS = "0.14.0"

_NAMESPACE = '''"""Where the operators of this copy are registered."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's full name."""
    return f"{namespace}::{{op_name}}"
'''


def assemble(folder: str | os.PathLike[str]) -> Path:
    """Write the package in the Hub's layout into ``folder``, which must be empty or not be there.

    The operators of a variant are in the namespace `_peftkernels_<backend>_<digest>`, the digest being of the copy's
    files: the same sources give the same folder, others another namespace.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no build.toml beside the package, as where it is installed without its repository.
        FileExistsError: ``folder`` is not empty.
        ValueError: a module refers to the package in a way that a copy cannot resolve.
    """
    folder = Path(folder)
    build = PACKAGE.parent / "build.toml"
    if not build.is_file():
        raise FileNotFoundError(f"{build}: found no such file, expected a checkout of the repository")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: found something there, expected an empty folder or none")
    description = _parsed(build)
    files = _copy(description["torch-noarch"]["pyext"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / "new"
        _write(new, {"build.toml": build.read_bytes()})
        _write(new / "torch-ext" / NAME, files)
        for backend in description["general"]["backends"]:
            _write(new / "build" / f"torch-{backend}", _variant(files, backend, description["general"]))
        os.replace(new, folder)
    return folder


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _copy(suffixes: list[str]) -> dict[str, bytes]:
    """The package's files by their path in a copy."""
    files = {}
    for path in sorted(PACKAGE.rglob("*")):
        within = PurePosixPath(path.relative_to(PACKAGE).as_posix())
        left_out = any(within == PurePosixPath(name) or PurePosixPath(name) in within.parents for name in LEFT_OUT)
        if left_out or path.suffix.removeprefix(".") not in suffixes:
            continue
        content = path.read_bytes()
        if path.suffix == ".py":
            content = rewritten(content.decode(), within).encode()
        files[str(within)] = content
    return files


def _variant(files: Mapping[str, bytes], backend: str, general: Mapping[str, Any]) -> dict[str, bytes]:
    """A copy with what kernel-builder would add to it."""
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] + b"\0" for name in sorted(files)))
    namespace = f"_{NAME}_{backend}_{digest.hexdigest()[:10]}"
    metadata = {
        "name": general["name"],
        "id": namespace,
        "version": general["version"],
        "kernels-minver": OLDEST_KERNELS,
        "license": general["license"],
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
    }
    return {
        **files,
        f"{GENERATED}.py": _NAMESPACE.format(namespace=namespace).encode(),
        "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode(),
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
