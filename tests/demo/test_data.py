"""Texts and labels: what is taken, what is left out, how it is divided, and what wrong files are told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from demo import data
from demo.data import Document
from demo.errors import InputError


@pytest.fixture(scope="module")
def standard_library() -> list[Document]:
    return data.deduplicate(data.standard_library_documents())


def test_sources_are_parsed_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-imported"
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(
        f'"""Encode and decode\n    JSON documents."""\nopen({str(marker)!r}, "w")\n'
        'class Decoder:\n    """Simple decoder of documents."""\n    def raw(self):\n        """Too short."""\n'
    )
    (tmp_path / "json" / "broken.py").write_text('"""Has four good words"""\ndef (:\n')
    (tmp_path / "json" / "tests").mkdir()
    (tmp_path / "json" / "tests" / "case.py").write_text('"""A docstring of the tests."""\n')
    (tmp_path / "this.py").write_text('"""A module that prints when imported."""\n')
    (tmp_path / "not_in_the_library.py").write_text('"""A module of somebody else."""\n')
    (tmp_path / "os.py").write_text('"""Routines of the operating system."""\n')
    assert data.standard_library_documents(tmp_path) == [
        Document("Encode and decode JSON documents.", "json"),
        Document("Simple decoder of documents.", "json"),
        Document("Routines of the operating system.", "os"),
    ]
    assert not marker.exists()


def test_no_sources_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}.*--data"):
        data.standard_library_documents(tmp_path)


def test_standard_library_gives_modules_of_useful_size(standard_library: list[Document]) -> None:
    counts = Counter(d.label for d in data.select_modules(standard_library, seed=0))
    assert 30 <= len(counts) <= 40
    assert min(counts.values()) >= 40
    assert max(counts.values()) == 200


def test_selection_and_split_depend_on_the_seed_alone(standard_library: list[Document]) -> None:
    def divide(seed: int) -> data.Split:
        return data.split(data.select_modules(standard_library, seed), seed, "the standard library")

    assert divide(3) == divide(3)
    assert divide(3) != divide(4)


def test_no_text_is_in_training_and_test(standard_library: list[Document]) -> None:
    split = data.split(data.select_modules(standard_library, 0), 0, "the standard library")
    train = {data.normalised(d) for d in split.train}
    test = {data.normalised(d) for d in split.test}
    assert len(train) == len(split.train)
    assert len(test) == len(split.test)
    assert not train & test


def test_every_label_is_divided_four_to_one() -> None:
    documents = [
        Document(f"text {label} {i}", label) for label, n in (("a", 100), ("b", 40), ("c", 5)) for i in range(n)
    ]
    split = data.split(documents, 0, "here")
    assert split.labels == ("a", "b", "c")
    assert Counter(d.label for d in split.test) == {"a": 20, "b": 8, "c": 1}
    assert Counter(d.label for d in split.train) == {"a": 80, "b": 32, "c": 4}
    assert {*split.train, *split.test} == {*documents}


def test_duplicates_go_and_ambiguous_texts_go_altogether() -> None:
    documents = [
        Document("Return the value.", "a"),
        Document("Close the file.", "a"),
        Document("return  the VALUE", "a"),
        Document("Close the file!", "b"),
        Document("Open it.", "b"),
    ]
    assert data.deduplicate(documents) == [Document("Return the value.", "a"), Document("Open it.", "b")]


def test_name_share_counts_words_not_parts_of_words() -> None:
    documents = [Document("The json codec.", "json"), Document("Jsonish text.", "json"), Document("Other.", "os")]
    assert data.name_share(documents) == pytest.approx(1 / 3)


def test_jsonl_is_read_with_blank_lines_and_further_fields(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": " two\\n words ", "label": "a", "id": 3}\n\n{"text": "Zürich", "label": "b"}', "utf-8")
    assert data.read_jsonl(path) == [Document("two words", "a"), Document("Zürich", "b")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a", "label": ', r"found no JSON: .*column"),
        (b"\xff\xfe", r"found a byte that is not UTF-8, 0xff"),
        (b'["a", "b"]', r"found \['a', 'b'\], expected a JSON object"),
        (b'{"label": "x"}', r"field 'text' is missing; found \['label'\]"),
        (b'{"text": "x"}', r"field 'label' is missing; found \['text'\]"),
        (b'{"text": 7, "label": "x"}', r"field 'text' must be a string, found int"),
        (b'{"text": "x", "label": null}', r"field 'label' must be a string, found NoneType"),
        (b'{"text": "  ", "label": "x"}', r"field 'text' is empty"),
        (b'{"text": "x", "label": ""}', r"field 'label' is empty"),
        (b'{"text": "half an \\ud83d", "label": "x"}', r"text: found half of a surrogate pair, \\ud83d"),
        (b'{"text": "x", "label": "\\udc9d"}', r"label: found half of a surrogate pair, \\udc9d"),
        (b'{"text": "x", "label": "y", "z": ' + b"[" * 100_000, r"found values nested too deep"),
        (b'{"text": "x", "label": "y", "z": ' + b"[" * 80 + b"]" * 80 + b"}", r"found values nested too deep"),
    ],
    ids=[
        "truncated",
        "encoding",
        "array",
        "no-text",
        "no-label",
        "number",
        "null",
        "blank-text",
        "blank-label",
        "half-pair",
        "half-pair-label",
        "endless-nesting",
        "deep-nesting",
    ],
)
def test_malformed_line_names_file_line_and_field(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "fine", "label": "x"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"--data: {path}, line 3: {complaint}"):
        data.read_jsonl(path)


def test_missing_unreadable_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--data: {tmp_path}/none.jsonl: no such file"):
        data.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=f"--data: {tmp_path}: cannot be read"):
        data.read_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty.jsonl: is empty"):
        data.read_jsonl(tmp_path / "empty.jsonl")


def test_too_few_labels_or_texts_are_refused() -> None:
    one = [Document(f"text {i}", "only") for i in range(10)]
    with pytest.raises(InputError, match="--data: f: found 1 different labels, expected at least 2"):
        data.split(one, 0, "--data: f")
    rare = [Document(f"other {i}", "rare") for i in range(4)]
    with pytest.raises(InputError, match=r"--data: f: field 'label': .* at least 5 .* 'rare' \(4\)"):
        data.split(one + rare, 0, "--data: f")


def test_too_small_a_standard_library_is_refused() -> None:
    documents = [Document(f"text {label} {i}", label) for label in "abc" for i in range(50)]
    with pytest.raises(InputError, match="3 modules with 40 or more docstrings, expected at least 10"):
        data.select_modules(documents, 0)
