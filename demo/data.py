"""Labelled texts for the demo: docstrings of the running Python's standard library, or the user's own JSON Lines file.

Standard-library sources are parsed, never imported, so no module's side effects happen. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.errors import InputError
from peftkernels._reading import check_object, parse_json

MODULES = 40
LEAST_PER_MODULE = 40
MOST_PER_MODULE = 200
LEAST_MODULES = 10
LEAST_WORDS = 4
LEAST_PER_LABEL = 5
TEST_SHARE = 0.2

# Folders of the standard library that hold tests, bundled packages and examples rather than the library itself.
_NOT_LIBRARY = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "pydoc_data"})
_NOT_MODULES = frozenset({"idlelib", "lib2to3", "turtledemo", "ensurepip", "test", "this", "antigravity"})


@dataclass(frozen=True)
class Document:
    """One text with its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """Documents divided into training and test sets; ``labels`` is sorted and a label's class is its index there."""

    labels: tuple[str, ...]
    train: tuple[Document, ...]
    test: tuple[Document, ...]


def standard_library_documents(root: Path | None = None) -> list[Document]:
    """Docstrings of modules, classes and functions below ``root``, labelled with their top-level module.

    Args:
        root: folder of the standard library's sources; the running Python's when None.

    Whitespace is collapsed; docstrings of fewer than four words are left out. Order: module name, file, position.

    Raises:
        InputError: ``root`` holds no Python sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents: list[Document] = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _NOT_MODULES:
            continue
        for file in _sources(root, name):
            documents.extend(Document(text, name) for text in _docstrings(file))
    if not documents:
        raise InputError(f"{root}: no standard-library sources with docstrings found; pass --data FILE.jsonl")
    return documents


def _sources(root: Path, name: str) -> list[Path]:
    package = root / name
    if not package.is_dir():
        module = root / f"{name}.py"
        return [module] if module.is_file() else []
    return sorted(f for f in package.rglob("*.py") if not _NOT_LIBRARY.intersection(f.relative_to(root).parts))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if len(words) >= LEAST_WORDS:
                yield " ".join(words)


def read_jsonl(path: Path) -> list[Document]:
    """Read ``{"text": str, "label": str}`` objects, one a line; blank lines and further fields are ignored.

    Raises:
        InputError: names the file, the line and the field that is wrong.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"--data: {path}: no such file") from None
    except OSError as error:
        raise InputError(f"--data: {path}: cannot be read: {error.strerror}") from None
    documents = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            documents.append(_parse_line(line, where=f"--data: {path}, line {number}"))
    if not documents:
        raise InputError(f'--data: {path}: is empty; expected one {{"text": ..., "label": ...}} object a line')
    return documents


def _parse_line(line: bytes, where: str) -> Document:
    try:
        row = check_object(parse_json(line, where), where)
    except ValueError as error:
        raise InputError(str(error)) from None
    for field in ("text", "label"):
        if field not in row:
            raise InputError(f"{where}: field '{field}' is missing; found {sorted(row) or 'no fields'}")
        if not isinstance(row[field], str):
            raise InputError(f"{where}: field '{field}' must be a string, found {type(row[field]).__name__}")
        if not row[field].strip():
            raise InputError(f"{where}: field '{field}' is empty")
    return Document(" ".join(row["text"].split()), row["label"].strip())


def normalised(document: Document) -> Hashable:
    """The text without case, punctuation and spacing: documents that agree in this are taken for the same text."""
    return re.sub(r"[\W_]+", " ", document.text.lower()).strip()


def deduplicate(documents: Iterable[Document], key: Callable[[Document], Hashable] = normalised) -> list[Document]:
    """Keep one document per key; drop every document whose key occurs under several labels.

    A text found under two labels has no right answer, and a text found twice could be in training and in test.
    """
    documents = list(documents)
    labels = defaultdict(set)
    for document in documents:
        labels[key(document)].add(document.label)
    kept = {key(document): document for document in reversed(documents) if len(labels[key(document)]) == 1}
    return list(reversed(kept.values()))


def select_modules(documents: Iterable[Document], seed: int) -> list[Document]:
    """The 40 modules with the most docstrings, at least 40 each; at most 200 of each, drawn with ``seed``.

    Raises:
        InputError: fewer than 10 modules have 40 docstrings.
    """
    by_label = _by_label(documents)
    ranked = sorted(by_label, key=lambda label: (-len(by_label[label]), label))
    chosen = sorted(label for label in ranked[:MODULES] if len(by_label[label]) >= LEAST_PER_MODULE)
    if len(chosen) < LEAST_MODULES:
        raise InputError(
            f"the standard library of this Python has {len(chosen)} modules with {LEAST_PER_MODULE} or more "
            f"docstrings, expected at least {LEAST_MODULES}; pass --data FILE.jsonl"
        )
    draw = random.Random(seed)
    selected: list[Document] = []
    for label in chosen:
        group = by_label[label]
        picks = sorted(draw.sample(range(len(group)), min(MOST_PER_MODULE, len(group))))
        selected.extend(group[i] for i in picks)
    return selected


def split(documents: Iterable[Document], seed: int, source: str) -> Split:
    """Divide each label's documents 80/20 into training and test, drawn with ``seed``; at least one of each a label.

    Args:
        source: named in errors, for instance the data file.

    Raises:
        InputError: fewer than two labels, or a label with fewer than five documents.
    """
    by_label = _by_label(documents)
    if len(by_label) < 2:
        raise InputError(f"{source}: found {len(by_label)} different labels, expected at least 2")
    rare = {label: len(group) for label, group in sorted(by_label.items()) if len(group) < LEAST_PER_LABEL}
    if rare:
        listed = ", ".join(f"'{label}' ({count})" for label, count in list(rare.items())[:5])
        more = "" if len(rare) <= 5 else f" and {len(rare) - 5} more"
        raise InputError(
            f"{source}: field 'label': every label needs at least {LEAST_PER_LABEL} different texts; "
            f"too few for {listed}{more}"
        )
    draw = random.Random(seed)
    train: list[Document] = []
    test: list[Document] = []
    for label in sorted(by_label):
        group = list(by_label[label])
        draw.shuffle(group)
        held_out = max(1, round(TEST_SHARE * len(group)))
        test.extend(group[:held_out])
        train.extend(group[held_out:])
    return Split(tuple(sorted(by_label)), tuple(train), tuple(test))


def _by_label(documents: Iterable[Document]) -> dict[str, list[Document]]:
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.label].append(document)
    return groups


def name_share(documents: Iterable[Document]) -> float:
    """Share of documents whose text contains their own label as a word, which makes them easy."""
    found = Counter(
        re.search(rf"\b{re.escape(document.label.lower())}\b", document.text.lower()) is not None
        for document in documents
    )
    return found[True] / max(1, found.total())
