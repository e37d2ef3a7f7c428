"""Builds the C++ extension where torch and a compiler are, and a working pure-Python package where they are not.

PEFTKERNELS_BUILD=auto (default) warns and goes on without the extension when it cannot be built; `required` fails
instead; `off` does not try. The CUDA sources are added when torch has CUDA, nvcc is found, and there are any.
PEFTKERNELS_SANITIZE=1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
MODES = ("auto", "required", "off")
OPTIMISED = ("-O3", "-g0", "-DNDEBUG")
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")


def extension_arguments(required: bool) -> dict[str, Any]:
    """The `ext_modules` and `cmdclass` arguments of setup, empty when torch is not there to build against."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if required:
            raise
        warn(f"torch cannot be imported ({error})")
        return {}

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if required:
                    raise
                warn(str(error))
                # What was not built must not be looked for when files are copied.
                self.extensions = []

    # The environment's ninja, which is on nobody's path when pip is called by its full name.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    cuda_sources = [*(ROOT / "csrc" / "cuda").glob("*.cu")]
    use_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None and bool(cuda_sources)
    extension = cpp_extension.CUDAExtension if use_cuda else cpp_extension.CppExtension
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sanitize = os.environ.get("PEFTKERNELS_SANITIZE", "0") == "1"
    cxx = [
        *(SANITIZED if sanitize else OPTIMISED),
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        *openmp,
    ]
    module = extension(
        "peftkernels._C",
        [str(path.relative_to(ROOT)) for path in [*sources, *(cuda_sources if use_cuda else [])]],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-DNDEBUG"]},
        extra_link_args=[*openmp, *(SANITIZED[-1:] if sanitize else [])],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def warn(reason: str) -> None:
    print(
        f"peftkernels: the C++ kernels were not built: {reason}\n"
        "peftkernels: the package will run on its PyTorch backend. To build the kernels, install torch and a C++ "
        "compiler, then install with --no-build-isolation.",
        file=sys.stderr,
    )


mode = os.environ.get("PEFTKERNELS_BUILD", "auto")
if mode not in MODES:
    raise SystemExit(f"PEFTKERNELS_BUILD: found {mode!r}, expected one of {', '.join(MODES)}")
setup(**({} if mode == "off" else extension_arguments(mode == "required")))
