"""One module's source for a copy of the package that is imported under another name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

NAME = "peftkernels"
# kernel-builder writes a module of this name into a copy, which says where the copy's operators are registered: the
# package has none.
GENERATED = "_ops"
_ABSOLUTE = re.compile(rf"{NAME}(\.\w+)+")


def rewritten(source: str, path: PurePosixPath) -> str:
    """The module at ``path`` in the package, its imports of the package relative, its operators in `GENERATED`'s
    namespace. Comments and layout stay.

    Raises:
        ValueError: the module refers to the package in a way that this does not know.
    """
    rewriter = _Rewriter(source, path)
    rewriter.visit(ast.parse(source))
    new = rewriter.result()
    for line, what in _left(ast.parse(new)):
        raise ValueError(f"{path}, near line {line}: found {what}, which a copy under another name cannot resolve")
    return new


class _Rewriter(ast.NodeVisitor):
    def __init__(self, source: str, path: PurePosixPath) -> None:
        self.source = source.encode()
        self.path = path
        # `from .` is the folder that the module is in.
        self.dots = "." * len(path.parts)
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []
        self.used: set[str] = set()
        self.names: set[str] = set()
        self.imports_end = 0

    def result(self) -> str:
        if self.used & self.names:
            raise ValueError(f"{self.path}: found {', '.join(self.used & self.names)}, names that a copy imports there")
        if self.used:
            line = f"\nfrom {self.dots}{GENERATED} import {', '.join(sorted(self.used))}"
            self.edits.append((self.imports_end, self.imports_end, line))
        new = self.source
        for start, end, text in sorted(self.edits, reverse=True):
            new = new[:start] + text.encode() + new[end:]
        return new.decode()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.names.update(alias.asname or alias.name for alias in node.names)
        if node.module == "__future__":
            self.imports_end = self._span(node)[1]
        if node.level or node.module is None or node.module.split(".")[0] != NAME:
            return
        start, end = self._span(node)
        match = re.match(rb"from\s+([\w.]+)", self.source[start:end])
        assert match is not None
        within = node.module[len(NAME) + 1 :]
        self.edits.append((start + match.start(1), start + match.end(1), self.dots + within))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_namespace(node):
            self._replace(node, self._use("ops"))
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        first = node.args[0] if node.args else None
        if called == "torch.library.Library" and isinstance(first, ast.Constant) and first.value == NAME:
            self._replace(first, f'{self._use("add_op_namespace_prefix")}("").removesuffix("::")')
        elif called == "importlib.import_module" and len(node.args) == 1 and _text(first).startswith(f"{NAME}."):
            self._replace(first, self._segment(first).replace(f"{NAME}.", self.dots, 1) + ", __package__")
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self._visit_text(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._visit_text(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_arg(self, node: ast.arg) -> None:
        self.names.add(node.arg)
        self.generic_visit(node)

    def _visit_text(self, node: ast.expr) -> None:
        if _text(node).startswith(f"{NAME}::"):
            name = self._segment(node).replace(f"{NAME}::", "", 1)
            self._replace(node, f"{self._use('add_op_namespace_prefix')}({name})")

    def _use(self, name: str) -> str:
        self.used.add(name)
        return name

    def _span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _segment(self, node: ast.expr | None) -> str:
        assert node is not None
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _replace(self, node: ast.expr | None, text: str) -> None:
        assert node is not None
        self.edits.append((*self._span(node), text))


def _is_namespace(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{NAME}"


def _text(node: ast.AST | None) -> str:
    """How a string or f-string begins; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0] if node.values else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _left(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What in a rewritten module still means the package by its name."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            modules = [node.module]
        if any(module.split(".")[0] == NAME for module in modules):
            assert isinstance(node, ast.stmt)
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.expr):
            text = _text(node)
            if _is_namespace(node) or text.startswith(f"{NAME}::") or _ABSOLUTE.fullmatch(text):
                yield node.lineno, ast.unparse(node)
