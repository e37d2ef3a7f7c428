"""Runs tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m support.sanitize`.

The repository is copied to build/sanitized and the extension built there with the sanitizers, so that the one that is
in use stays as it is. Arguments are pytest's, in the place of the tests that are listed here. Any report is a failure.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "sanitized"
REPORTS = COPY / "reports"
# What reaches C++, but for what is long and reaches the same code again. The sanitized kernels are ten times slower.
TESTS = (
    "tests/operators/test_raw_calls.py",
    "tests/operators/test_errors.py",
    "tests/operators/test_direct_call.py",
    "tests/operators/test_direct_results.py",
    "tests/operators/test_shapes.py",
    "tests/operators/test_rank_states.py",
    "tests/operators/test_cpu_blocks.py",
    "tests/operators/test_dropout.py",
    "tests/operators/test_gradient_subsets.py",
    "tests/operators/test_pack_cache.py",
    "tests/operators/test_shared_shrink.py",
    "tests/operators/test_threads.py",
    "tests/allocation/test_kernels.py",
    "tests/allocation/test_mask_and_term_kernels.py",
    "tests/allocation/test_orthogonality.py",
    "tests/allocation/test_raw_allocation_calls.py",
)
# Of calls of the kernels by their implementation's name, those of the C++ kernels. AddressSanitizer does not hand out
# again what was freed, which one test waits for.
ONLY = "not triton and not eager and not reference and not reuse_freed_memory"


def copy() -> None:
    """Copy what git knows, or would, and what changed since the last time."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, COPY / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(source.readlink())
        elif source.is_file() and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def build() -> None:
    """Build the extension into the copy."""
    environment = {**os.environ, "PEFTKERNELS_SANITIZE": "1", "PEFTKERNELS_BUILD": "required"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env=environment, check=True, stdout=subprocess.DEVNULL)


def libraries() -> str:
    """The sanitizers' run-time libraries of the compiler, which a process loads before all others."""
    compiler = os.environ.get("CXX", "g++").split()
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        done = subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        found.append(str(Path(done.stdout.strip()).resolve()))
    return " ".join(found)


def main(arguments: list[str]) -> int:
    copy()
    build()
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir()
    log = f"log_path={REPORTS}/report"
    environment = {
        **os.environ,
        "LD_PRELOAD": libraries(),
        # Python and PyTorch keep what they allocated until the end, and one of them asks for more than there is.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        "PYTHONPATH": str(COPY),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or (*TESTS, "-k", ONLY))]
    code = subprocess.run(command, cwd=COPY, env=environment).returncode
    reports = sorted(REPORTS.iterdir())
    for report in reports:
        print(report.read_text(errors="replace"))
    found = sum(report.read_text(errors="replace").count("ERROR: AddressSanitizer") for report in reports)
    undefined = sum(report.read_text(errors="replace").count("runtime error:") for report in reports)
    print(f"sanitizers: {found} reports of AddressSanitizer, {undefined} of UndefinedBehaviorSanitizer")
    return code or int(bool(reports))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
