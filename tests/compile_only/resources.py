"""What compiled Triton kernels take of a GPU, read off their machine code, and what is wrong with it.

    cd tests && python -m compile_only.resources [--capability 9.0] [--variants MODULE]

prints the table for every shipped kernel and configuration, and ends with exit code 1 if one of them has a fault.

Registers and stack come from the machine code itself, through Triton's own cuobjdump: assembling the PTX a second time
gives other numbers, because Triton passes options of its own to ptxas, and which ptxas it takes depends on the release.
What only the assembler knows, that it had to serialise wgmma, is in the log of that same compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compile_only import ordering

Capability = tuple[int, int]

TESTS = Path(__file__).resolve().parent.parent
SHIPPED = "peftkernels.backends.triton.shipped"
# For one that hangs: beside busy processes it lasts long.
WORKER_SECONDS = 1800
# Of tensor memory, sm_100's accumulators: what a block may allocate.
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Architecture:
    """`shared` is the most bytes of shared memory that a block may ask for; `matrix` the fastest matrix instruction."""

    shared: int
    matrix: str


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 163 and 227 KiB.
ARCHITECTURES: dict[Capability, Architecture] = {
    (8, 0): Architecture(163 * 1024, "mma.sync"),
    (9, 0): Architecture(227 * 1024, "wgmma.mma_async"),
    (10, 0): Architecture(227 * 1024, "tcgen05.mma"),
}
_MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


class Variant(Protocol):
    """One kernel with one configuration and its dtypes."""

    @property
    def name(self) -> str: ...

    def compile(self, capability: Capability) -> Any:
        """Triton's CompiledKernel, made without a GPU."""

    def expects_wgmma(self, capability: Capability) -> bool:
        """Whether its products are meant for the warp-group instructions: wgmma on sm_90, tcgen05 on sm_100."""

    @property
    def overlaps(self) -> bool:
        """Whether a launch of it may begin before the one before it has ended."""

    @property
    def types(self) -> Mapping[str, str | None]:
        """Its arguments with their types; None for one that is not there."""

    @property
    def awaited(self) -> tuple[str, ...]:
        """The arguments whose memory the launch before it writes."""


@dataclass(frozen=True)
class Resources:
    """What one variant takes on one architecture.

    registers      per thread
    stack          bytes per thread of local memory: spilled registers, arrays that no register holds
    shared         bytes per block
    tensor_memory  columns per block
    instructions   how many matrix instructions of each kind its PTX has
    remarks        the assembler's remarks on serialised wgmma, a fault where wgmma is meant
    early          what it must not do before it waits for the launch before it; see `ordering`
    error          why it does not compile, where it does not
    seconds        that compiling took
    """

    variant: str
    capability: Capability
    expects_wgmma: bool
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)

    def faults(self) -> list[str]:
        """What must not be shipped, in words."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        architecture = ARCHITECTURES[self.capability]
        found = [*(self.remarks if self.expects_wgmma else ()), *self.early]
        if self.stack:
            found.append(f"spills: {self.stack} bytes of stack per thread beside {self.registers} registers")
        if self.shared > architecture.shared:
            found.append(f"takes {self.shared} bytes of shared memory of at most {architecture.shared}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"takes {self.tensor_memory} columns of tensor memory of at most {TENSOR_MEMORY_COLUMNS}")
        if self.expects_wgmma and not self.instructions.get(architecture.matrix):
            there = ", ".join(f"{count} {name}" for name, count in self.instructions.items()) or "no matrix instruction"
            found.append(f"is meant for {architecture.matrix} and has {there}")
        return found


def measure(variant: Variant, capability: Capability) -> Resources:
    """Compile one variant for one architecture; a failure to compile is part of the result."""
    from triton import knobs

    base = Resources(variant.name, capability, variant.expects_wgmma(capability))
    log, start = io.StringIO(), time.perf_counter()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        # A kernel out of the cache has no log.
        knobs.compilation.always_compile = True
        try:
            compiled = variant.compile(capability)
        except Exception as failure:  # the compiler and the assembler raise what they like
            return _with(base, error=f"{type(failure).__name__}: {str(failure)[-600:]}")
    seconds = time.perf_counter() - start
    if "ptxas" not in log.getvalue():
        raise RuntimeError(f"{variant.name}: the assembler's log is missing, was it compiled?")
    registers, stack = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    early: list[str] = []
    if variant.overlaps:
        code = _cuobjdump(compiled.asm["cubin"], "--dump-sass")
        early = ordering.early_faults(ptx, code, variant.types, variant.awaited)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", ptx)) for name in _MATRIX_INSTRUCTIONS}
    return _with(
        base,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions={name: count for name, count in counts.items() if count},
        remarks=remarks(log.getvalue()),
        early=tuple(early),
        seconds=seconds,
    )


def _with(base: Resources, **changes: Any) -> Resources:
    return Resources(**{**vars(base), **changes})


def remarks(log: str) -> tuple[str, ...]:
    """ptxas's remarks with codes C7500 to C7599: wgmma instructions wait for each other."""
    return tuple(sorted(set(re.findall(r"\(C75\d\d\).*", log))))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory per thread, the most of any function."""
    listing = _cuobjdump(cubin, "--dump-resource-usage")
    functions = [
        {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}
        for line in listing.splitlines()
        if "REG:" in line
    ]
    if not functions:
        raise RuntimeError(f"cuobjdump lists no function:\n{listing}")
    return max(one["REG"] for one in functions), max(one["STACK"] + one["LOCAL"] for one in functions)


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's own cuobjdump lists of machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Measuring:
    """Processes that compile, with an empty cache, every variant that the module `variants` lists, each its share.

    They start at once; `results` waits for them, and the end of the block ends them.
    """

    def __init__(
        self,
        capabilities: Sequence[Capability] = tuple(ARCHITECTURES),
        variants: str = SHIPPED,
        processes: int = 2,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The interpreter would stand in for the compiler.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(Path(self._folder.name) / "cache")
        environment["PYTHONPATH"] = os.pathsep.join((str(TESTS), *filter(None, sys.path)))
        command = [sys.executable, "-m", "compile_only.resources", "--variants", variants]
        for capability in capabilities:
            command += ["--capability", _dotted(capability)]
        self._running: list[tuple[subprocess.Popen[bytes], Path, Path]] = []
        for share in range(processes):
            # Files take any number of lines while nobody reads.
            out, log = (Path(self._folder.name) / f"{share}.{name}" for name in ("out", "log"))
            with out.open("wb") as stdout, log.open("wb") as stderr:
                process = subprocess.Popen(
                    [*command, "--share", f"{share}/{processes}"], env=environment, stdout=stdout, stderr=stderr
                )
            self._running.append((process, out, log))

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and remove what was written."""
        for process, _, _ in self._running:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def results(self) -> list[Resources]:
        """All that was measured; raises RuntimeError when a process died, with the variant that it died of."""
        found = []
        for process, out, log in self._running:
            code = process.wait(timeout=WORKER_SECONDS)
            if code != 0:
                raise RuntimeError(f"a process that compiles kernels died ({code}):\n{log.read_text()[-3000:]}")
            found += [_from_json(line) for line in out.read_text().splitlines()]
        return found


def measure_all(
    capabilities: Sequence[Capability] = tuple(ARCHITECTURES), variants: str = SHIPPED, processes: int = 2
) -> list[Resources]:
    """What `Measuring` finds, waited for."""
    with Measuring(capabilities, variants, processes) as measuring:
        return measuring.results()


def _from_json(line: str) -> Resources:
    values = json.loads(line)
    tuples = {name: tuple(values[name]) for name in ("capability", "remarks", "early")}
    return Resources(**{**values, **tuples})


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _listed(module: str, capabilities: Sequence[Capability]) -> Iterator[tuple[Variant, Capability]]:
    for capability in capabilities:
        for variant in importlib.import_module(module).variants(capability):
            yield variant, capability


def _print_share(share: str, module: str, capabilities: Sequence[Capability]) -> None:
    """What one process measures, as lines of JSON; on stderr, what it is at."""
    place, count = map(int, share.split("/"))
    for index, (variant, capability) in enumerate(_listed(module, capabilities)):
        if index % count == place:
            print(f"{variant.name} for {_dotted(capability)}", file=sys.stderr, flush=True)
            print(json.dumps(asdict(measure(variant, capability))), flush=True)


def _print_table(found: list[Resources]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("kernel", "capability", "registers", "stack", "shared", "matrix instructions", "faults and remarks")
    for one in sorted(found, key=lambda one: (one.variant, one.capability)):
        instructions = ", ".join(f"{count} {name}" for name, count in one.instructions.items())
        numbers = (str(one.registers), str(one.stack), str(one.shared))
        notes = dict.fromkeys((*one.faults(), *one.remarks))
        cells = (one.variant, _dotted(one.capability), *numbers, instructions, "; ".join(notes))
        table.add_row(*map(escape, cells))
    # Into a file or a pipe, lines are as long as they need to be.
    Console(width=None if Console().is_terminal else 300).print(table)


def _capability(text: str) -> Capability:
    for known in ARCHITECTURES:
        if _dotted(known) == text:
            return known
    raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(map(_dotted, ARCHITECTURES))}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compile_only.resources", description="Resources of Triton kernels")
    parser.add_argument("--capability", type=_capability, action="append", help="compute capability; all by default")
    parser.add_argument("--variants", default=SHIPPED, help="the module whose variants() are compiled")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--share", help="i/n: measure every n-th variant from the i-th on, and print lines of JSON")
    arguments = parser.parse_args()
    capabilities = arguments.capability or tuple(ARCHITECTURES)
    if arguments.share:
        _print_share(arguments.share, arguments.variants, capabilities)
        return 0
    found = measure_all(capabilities, arguments.variants, arguments.processes)
    _print_table(found)
    return 1 if any(one.faults() for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
