"""The rules that the project's structure is kept by, read off the source. Prints what breaks them and fails.

    python .ci/house.py [FOLDER]    the repository's folder, this one by default

Arguments   No function but a few named ones takes more than eight of the operator's arguments, and no class but the
            records of peftkernels/ops/call.py has more than eight of them as fields. The same holds for C++.
Direction   Imports and includes go downwards in the tables below, deferred ones and those for type checkers as well.
Circles     There is none, of modules or of folders, whatever kind of import closes it.
Docstrings  They are in Google's form, which tools parse: "name: text" under Args: or Attributes: and not in two
            columns, errors under Raises: and not in a sentence.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peftkernels"
PYTHON = (PACKAGE, "bench", "demo")
MOST = 8

# The operator's arguments, each with the other names it goes by.
ARGUMENTS = {
    "x": "inputs rows",
    "grad_y": "dy grad_output grad_out grad_outputs",
    "weight": "w W base_weight frozen_weight weight_of",
    "lora_A": "A down",
    "lora_B": "B up",
    "bias": "b",
    "gate": "gates lora_E E",
    "rank_plan": "plan ranks",
    "rank_state": "state states",
    "rank_order": "order",
    "rank_counts": "counts",
    "scaling": "scale scaling_value",
    "scaling_tensor": "",
    "dropout_p": "p dropout lora_dropout",
    "dropout_seed": "seed",
    "save_shrink": "save",
    "shrink": "S given given_shrink precomputed precomputed_shrink saved saved_shrink",
    "needs": "",
}
_ARGUMENTS = {name for argument, others in ARGUMENTS.items() for name in (argument, *others.split())}
# Users call these by their arguments' names: the design's page of the operator fixes both signatures.
PUBLIC = ("lora_linear", "explain")
PUBLIC_FOLDER = f"{PACKAGE}/functional/"
RECORDS = f"{PACKAGE}/ops/call.py"

# From the top down: whoever stands in a row may import what stands in a lower one, and within its own entry. The
# package's own entry is its __init__.py alone, and the last stands for every private module beside it.
LAYERS = (
    ("bench",),
    ("demo",),
    (f"{PACKAGE}.__main__",),
    (f"{PACKAGE}.cli",),
    (PACKAGE,),
    (f"{PACKAGE}.layers",),
    (f"{PACKAGE}.integrations",),
    (f"{PACKAGE}.distributed",),
    (f"{PACKAGE}.allocation",),
    (f"{PACKAGE}.nn",),
    (f"{PACKAGE}.functional",),
    (f"{PACKAGE}.backends",),
    (f"{PACKAGE}.ops",),
    (f"{PACKAGE}._",),
)
# The same for folders and single files of the C++ code.
INCLUDES = (
    ("csrc/bindings.cpp",),
    ("csrc/cpu", "csrc/cuda"),
    ("csrc/cpu/linear", "csrc/cpu/allocation"),
    ("csrc/cpu/packs",),
    ("csrc/cpu/gemm",),
    ("csrc",),
)
# What a product file never imports: the programs around the package, and what lies in tests/.
OUTSIDE = ("bench", "demo", "tests", "examples", "support", "attacks", "compile_only")
EXTENSION = f"{PACKAGE}._C"
BACKENDS = f"{PACKAGE}.backends."
# What every backend may know of the others: the contract, and the registry.
SHARED = (f"{BACKENDS}backend", f"{BACKENDS}registry")

_IMPORTERS = ("importlib.import_module", "import_module", "__import__")
# What a line of a docstring must not be, and why.
_MALFORMED = {
    re.compile(r'\s*[\w.*"<>/]+(, [\w.*"<>/]+)*( \([^)]*\))? {2,}\S'): "two columns in a docstring",
    re.compile(r".*\bRaises (what\b|[A-Z]\w*Error\b)"): "an error in a docstring's sentence, not under Raises:",
    re.compile(r"\s*Arguments:$"): "a docstring's arguments under another word than Args:",
}


class Finding(NamedTuple):
    """What breaks a rule, and where."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Edge(NamedTuple):
    """An import or an include: who asks for what, by module or file."""

    source: str
    target: str
    file: str
    line: int


def sources(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of every Python file of the package, the suite and the demo, by path."""
    files = (file for folder in PYTHON for file in sorted((root / folder).rglob("*.py")))
    inside = (file for file in files if file.resolve() == file)
    return {file.relative_to(root).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in inside}


def compiled_sources(root: Path) -> dict[str, str]:
    """The text of every C++ and CUDA file by path, without comments that go to the end of a line."""
    files = (file for file in sorted((root / "csrc").rglob("*")) if file.suffix in (".h", ".cpp", ".cu", ".cuh"))
    return {file.relative_to(root).as_posix(): re.sub("//.*", "", file.read_text(encoding="utf-8")) for file in files}


# --- arguments ---


def arguments(trees: dict[str, ast.Module]) -> Iterator[Finding]:
    """Functions, classes and assignments that spell the operator's arguments out once more."""
    for file, tree in trees.items():
        public = PUBLIC if file.startswith(PUBLIC_FOLDER) else ()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.name not in public and not _is_kernel(node):
                    yield from _too_many(file, node.lineno, f"{node.name}()", _parameters(node.args))
            elif isinstance(node, ast.Lambda):
                yield from _too_many(file, node.lineno, "a lambda", _parameters(node.args))
            elif isinstance(node, ast.ClassDef) and file != RECORDS:
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                named = [(part.target.id, part.annotation) for part in fields if isinstance(part.target, ast.Name)]
                yield from _too_many(file, node.lineno, f"class {node.name}", named)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    taken = [(name.id, None) for name in ast.walk(target) if isinstance(name, ast.Name)]
                    yield from _too_many(file, node.lineno, "an assignment", taken)


def compiled_arguments(texts: dict[str, str]) -> Iterator[Finding]:
    """Parameters, or what a call is given, that spell the operator's arguments out in C++; the records name fields."""
    for file, text in texts.items():
        for listed in re.finditer(r"\(([^()]*)\)", text):
            names = [re.findall(r"\w+", part)[-1:] for part in listed[1].split(",")]
            line = text.count("\n", 0, listed.start()) + 1
            yield from _too_many(file, line, "a list", [(name, None) for found in names for name in found])


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return True for what `triton.jit` compiles: a launch hands over pointers and numbers one by one."""
    return any(ast.unparse(decorator).split("(")[0] == "triton.jit" for decorator in function.decorator_list)


def _parameters(given: ast.arguments) -> list[tuple[str, ast.expr | None]]:
    every = (*given.posonlyargs, *given.args, *given.kwonlyargs)
    return [(parameter.arg, parameter.annotation) for parameter in every]


def _too_many(file: str, line: int, what: str, named: Sequence[tuple[str, ast.expr | None]]) -> Iterator[Finding]:
    found = [name for name, _ in named if name.strip("_").removesuffix("_ptr") in _ARGUMENTS]
    tensors = [name for name, annotation in named if annotation is not None and _is_tensor(annotation)]
    if len(found) > MOST:
        yield Finding(file, line, f"{what} takes {len(found)} of the operator's arguments: {', '.join(found)}")
    elif len(tensors) > MOST:
        yield Finding(file, line, f"{what} takes {len(tensors)} tensors: {', '.join(tensors)}")


def _is_tensor(annotation: ast.expr) -> bool:
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    parts = str(text).removeprefix("Optional[").removesuffix("]").split("|")
    return any(part.strip() in ("Tensor", "torch.Tensor") for part in parts)


# --- imports and includes ---


def imports(trees: dict[str, ast.Module]) -> list[Edge]:
    """Every import of one of our modules or of what lies around the package, wherever in a file it stands.

    An import of a.b.c is one of that module alone: that Python runs a/__init__.py on the way there is no dependency
    that anybody wrote.
    """
    modules = {_module(file) for file in trees} | {EXTENSION}
    edges = []
    for file, tree in trees.items():
        source = _module(file)
        folder = source if file.endswith("/__init__.py") else source.rpartition(".")[0]
        for node in ast.walk(tree):
            for name in _imported(node, folder):
                target = _nearest(name, modules)
                if target not in (None, source):
                    edges.append(Edge(source, str(target), file, node.lineno))  # type: ignore[attr-defined]
    return edges


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(node: ast.AST, folder: str) -> Iterator[str]:
    """Dotted names that a node imports: those of attributes too, which `_nearest` cuts off."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = folder.rsplit(".", node.level - 1)[0] if node.level else ""
        origin = ".".join(part for part in (start, node.module) if part)
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in _IMPORTERS and node.args:
        yield ast.unparse(node.args[0]).strip("'")


def _nearest(name: str, modules: set[str]) -> str | None:
    """The module that a dotted name lies in; None for one of somebody else's."""
    first = name.partition(".")[0]
    if first not in (PACKAGE, *OUTSIDE):
        return None
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def includes(texts: dict[str, str]) -> list[Edge]:
    """Every include of one of our headers: it lies beside the file, or is named from csrc/ on."""
    edges = []
    for source, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            found = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            if found:
                places = (posixpath.normpath(f"{folder}/{found[1]}") for folder in (posixpath.dirname(source), "csrc"))
                edges += [Edge(source, header, source, number) for header in places if header in texts][:1]
    return edges


def direction(edges: Iterable[Edge], table: Sequence[Sequence[str]], separator: str) -> Iterator[Finding]:
    """Edges that lead upwards, sideways, or to or from something that has no place in the table."""
    for edge in edges:
        source, target = _place(edge.source, table, separator), _place(edge.target, table, separator)
        if source is None:
            yield Finding(edge.file, 1, f"{edge.source} has no place in the table of layers (.ci/house.py)")
        elif target is None:
            yield Finding(
                edge.file, edge.line, f"{edge.source} must not use {edge.target}, which has no place in the table"
            )
        elif source != target and target[0] <= source[0]:
            yield Finding(edge.file, edge.line, f"{edge.source} must not use {edge.target}, which is not below it")


def _place(name: str, table: Sequence[Sequence[str]], separator: str) -> tuple[int, str] | None:
    """Row and entry of a module or file: the longest entry that fits; None where none does."""
    fitting = [
        (row, entry)
        for row, entries in enumerate(table)
        for entry in entries
        if name == entry or name.startswith(entry if entry.endswith("_") else entry + separator)
    ]
    place = max(fitting, key=lambda found: len(found[1]), default=None)
    return None if place and place[1] == PACKAGE != name else place


def backends(edges: Iterable[Edge]) -> Iterator[Finding]:
    """Imports of one backend by another, which know of each other through the registry alone."""
    for edge in edges:
        pair = [name.removeprefix(BACKENDS).partition(".")[0] for name in (edge.source, edge.target)]
        between = all(name.startswith(BACKENDS) and name not in SHARED for name in (edge.source, edge.target))
        if between and pair[0] != pair[1]:
            yield Finding(edge.file, edge.line, f"the backend {pair[0]} must not use the backend {pair[1]}")


def circles(edges: Sequence[Edge], separator: str) -> Iterator[Finding]:
    """Circles of modules or files, and of what lies in one folder: its modules and its folders, each as a whole."""
    levels: defaultdict[str, dict[tuple[str, str], Edge]] = defaultdict(dict)
    for edge in edges:
        levels[""].setdefault((edge.source, edge.target), edge)
        source, target = edge.source.split(separator), edge.target.split(separator)
        shared = next((i for i, (a, b) in enumerate(zip(source, target, strict=False)) if a != b), None)
        if shared:  # of two that lie in one folder; the folder's own __init__ is no part of it
            parent = separator.join(source[:shared])
            pair = separator.join(source[: shared + 1]), separator.join(target[: shared + 1])
            levels[parent].setdefault(pair, edge)
    reported: set[frozenset[str]] = set()
    for level in levels.values():
        graph: defaultdict[str, list[str]] = defaultdict(list)
        for source_name, target_name in level:
            graph[source_name].append(target_name)
        while circle := _circle(graph):
            steps = list(zip(circle, [*circle[1:], circle[0]], strict=True))
            if frozenset(circle) not in reported:
                reported.add(frozenset(circle))
                edge = level[steps[0]]
                ways = "; ".join(f"{level[step].file}:{level[step].line}" for step in steps[1:])
                yield Finding(edge.file, edge.line, f"a circle: {' → '.join([*circle, circle[0]])} ({ways})")
            graph[steps[0][0]].remove(steps[0][1])


def _circle(graph: dict[str, list[str]]) -> list[str] | None:
    """A shortest circle through the first node that lies on one."""
    for start in sorted(graph):
        paths = [[start]]
        seen = {start}
        for path in paths:
            for following in graph.get(path[-1], ()):
                if following == start:
                    return path
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
    return None


# --- docstrings ---


def docstrings(trees: dict[str, ast.Module]) -> Iterator[Finding]:
    """Lines of docstrings that tools would not parse."""
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=False)
                if text is None:
                    continue
                first = node.body[0].lineno
                for number, line in enumerate(text.splitlines(), first):
                    wrong = (why for form, why in _MALFORMED.items() if form.match(line))
                    yield from (Finding(file, number, f"{why}: {line.strip()[:60]}") for why in wrong)


def findings(root: Path) -> list[Finding]:
    """What breaks a rule, in the order of files and lines."""
    trees = sources(root)
    edges = imports(trees)
    texts = compiled_sources(root)
    headers = includes(texts)
    found = {
        *arguments(trees),
        *compiled_arguments(texts),
        *direction(edges, LAYERS, "."),
        *backends(edges),
        *circles(edges, "."),
        *direction(headers, INCLUDES, "/"),
        *circles(headers, "/"),
        *docstrings(trees),
    }
    return sorted(found)


def main(folder: str = str(ROOT)) -> int:
    found = findings(Path(folder).resolve())
    for finding in found:
        print(finding)
    print(f"house: {len(found)} findings" if found else "house: all rules hold")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
