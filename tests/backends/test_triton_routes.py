"""Which way a product goes on a GPU: tables, their nearest entries, what cannot serve, and what is forced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peftkernels.backends.triton.common import tiles
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import Choice, Entry, Product, Table

HOPPER, AMPERE = (9, 0), (8, 0)
TMA = Choice(routes.TAIL, "tma-128x256x64-8w-3s")
POINTER = Choice(routes.TAIL, "pointer-128x128x64-8w-3s")
WIDE = Product(routes.FORWARD, "bfloat16", 8192, 4096, 4096)


def table(*entries: Entry) -> Table:
    return Table("Test GPU", {"torch": "0", "commit": "none"}, entries)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a table for "Test GPU" where the package looks first."""
    monkeypatch.setenv("PEFTKERNELS_TRITON_TABLES", str(tmp_path))
    routes.forget_tables()

    def write(*entries: Entry) -> None:
        routes.write_table(tmp_path / routes.file_name("Test GPU"), table(*entries))
        routes.forget_tables()

    yield write
    monkeypatch.undo()
    routes.forget_tables()


def test_a_gpu_without_a_table_takes_the_library() -> None:
    choice, reason = routes.choose(WIDE, "GPU that nobody measured", HOPPER)
    assert choice == Choice(routes.LIBRARY)
    assert "GPU that nobody measured" in reason


def test_exact_then_nearest_then_default(measured) -> None:
    small = replace(WIDE, m=512)
    measured(Entry(WIDE, TMA), Entry(small, POINTER))
    assert routes.choose(WIDE, "Test GPU", HOPPER) == (TMA, "measured on 'Test GPU'")
    choice, reason = routes.choose(replace(WIDE, m=600), "Test GPU", HOPPER)
    assert choice == POINTER and "M=512" in reason
    choice, reason = routes.choose(replace(WIDE, m=6000, n=5120), "Test GPU", HOPPER)
    assert choice == TMA and "M=8192" in reason
    far = replace(WIDE, m=512, n=256, k=256)
    assert far.distance(small) > routes.FARTHEST
    choice, reason = routes.choose(far, "Test GPU", HOPPER)
    assert choice == Choice(routes.LIBRARY) and "nothing near" in reason


@pytest.mark.parametrize("other", [{"direction": routes.BACKWARD}, {"dtype": "float32"}])
def test_another_direction_or_width_of_operands_is_never_near(measured, other: dict[str, str]) -> None:
    measured(Entry(WIDE, TMA))
    assert routes.choose(replace(WIDE, **other), "Test GPU", HOPPER)[0] == Choice(routes.LIBRARY)


def test_16_bit_dtypes_stand_in_for_each_other(measured) -> None:
    half = replace(WIDE, dtype="float16")
    measured(Entry(WIDE, TMA))
    choice, reason = routes.choose(half, "Test GPU", HOPPER)
    assert choice == TMA and "bfloat16" in reason
    measured(Entry(WIDE, TMA), Entry(half, POINTER))
    assert routes.choose(half, "Test GPU", HOPPER)[0] == POINTER
    assert routes.choose(WIDE, "Test GPU", HOPPER)[0] == TMA


def test_an_entry_that_cannot_serve_is_passed_over(measured) -> None:
    measured(Entry(WIDE, TMA), Entry(replace(WIDE, m=2048), POINTER))
    ragged = replace(WIDE, n=4095)
    assert routes.choose(ragged, "Test GPU", HOPPER)[0] == POINTER
    assert routes.choose(WIDE, "Test GPU", AMPERE)[0] == POINTER


@pytest.mark.parametrize(
    ("choice", "product", "capability", "words"),
    [
        (Choice("shortcut"), WIDE, HOPPER, "no route 'shortcut'"),
        (Choice(routes.LIBRARY, TMA.tile), WIDE, HOPPER, "takes no tile"),
        (TMA, WIDE, AMPERE, "compute capability 9.0, found 8.0"),
        (TMA, replace(WIDE, dtype="float32"), HOPPER, "float16 and bfloat16"),
        (TMA, replace(WIDE, k=4097), HOPPER, "K = 4097"),
        (Choice(routes.SINGLE, TMA.tile), replace(WIDE, direction=routes.BACKWARD), HOPPER, "forward pass only"),
        (Choice(routes.DECODE, "decode-16x32x128-4w-4s"), WIDE, HOPPER, "at most 16 rows, found 8192"),
        (Choice(routes.DECODE, TMA.tile), replace(WIDE, m=1), HOPPER, "kind 'tma'"),
        (Choice(routes.TAIL, "decode-16x32x128-4w-4s"), WIDE, HOPPER, "kind 'decode'"),
    ],
)
def test_refusals_say_why(choice: Choice, product: Product, capability: tuple[int, int], words: str) -> None:
    reason = routes.refusal(choice, product, capability)
    assert reason is not None and words in reason
    if product.direction == routes.FORWARD and choice.route in routes.ROUTES:
        with routes.forced(choice), pytest.raises(RuntimeError, match="cannot serve"):
            routes.choose(product, "Test GPU", capability)


def test_forced_holds_in_its_block_alone(measured) -> None:
    measured(Entry(WIDE, TMA))
    with routes.forced(POINTER):
        assert routes.choose(WIDE, "Test GPU", HOPPER) == (POINTER, routes.FORCED)
        with routes.forced(None):
            assert routes.choose(WIDE, "Test GPU", HOPPER)[0] == TMA
    assert routes.choose(WIDE, "Test GPU", HOPPER)[0] == TMA


def test_a_forward_only_choice_leaves_the_backward_product_to_the_table(measured) -> None:
    backward = replace(WIDE, direction=routes.BACKWARD)
    measured(Entry(backward, POINTER))
    with routes.forced(Choice(routes.SINGLE, TMA.tile)):
        assert routes.choose(backward, "Test GPU", HOPPER)[0] == POINTER


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, (10, 0)])
@pytest.mark.parametrize("m", [1, 16, 128, 8192])
@pytest.mark.parametrize("direction", routes.DIRECTIONS)
def test_candidates_can_serve(dtype: str, capability: tuple[int, int], m: int, direction: str) -> None:
    product = Product(direction, dtype, m, 4096, 4096)
    found = routes.candidates(product, capability)
    assert found[0] == Choice(routes.LIBRARY)
    assert len(found) == len(set(found)) > 1
    assert all(routes.refusal(choice, product, capability) is None for choice in found)
    kinds = {tiles.tile(choice.tile).kind for choice in found if choice.tile}
    assert (tiles.TMA in kinds) == (capability >= HOPPER and dtype != "float32" and m > 16)
    assert (tiles.DECODE_TILE in kinds) == (m <= 16 and direction == routes.FORWARD)


def test_tables_survive_a_round_trip(tmp_path: Path) -> None:
    written = table(Entry(WIDE, TMA, {"library": 1.1, str(TMA): 1.03}), Entry(replace(WIDE, m=1), Choice("library")))
    routes.write_table(tmp_path / "t.json", written)
    assert routes.read_table(tmp_path / "t.json") == written


def test_an_interrupted_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    routes.write_table(path, table(Entry(WIDE, TMA)))
    before = path.read_text()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(routes.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        routes.write_table(path, table())
    assert path.read_text() == before


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"gpu": "x", "measured": {}}),
        json.dumps({"gpu": "x", "measured": {}, "entries": [{"product": {}, "choice": {}, "ratios": {}}]}),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        routes.read_table(path)


@pytest.mark.parametrize("choice", [Choice("shortcut"), Choice(routes.TAIL, "huge")])
def test_a_table_with_an_unknown_choice_is_refused(tmp_path: Path, choice: Choice) -> None:
    routes.write_table(tmp_path / "t.json", table(Entry(WIDE, choice)))
    with pytest.raises(ValueError, match=r"t\.json"):
        routes.read_table(tmp_path / "t.json")


def test_shipped_tables_can_serve_what_they_were_measured_for() -> None:
    for path in routes.TABLES.glob("*.json"):
        shipped = routes.read_table(path)
        assert path.name == routes.file_name(shipped.gpu)
        assert shipped.entries


def test_tile_names_are_read_back() -> None:
    for capability in (AMPERE, HOPPER, (10, 0)):
        for dtype in ("bfloat16", "float32"):
            for tile in tiles.shipped(dtype, capability):
                assert tiles.tile(tile.name) == tile
    for wrong in ("", "tma", "tma-1x2x3-4w", "wgmma-128x128x64-8w-3s"):
        with pytest.raises(ValueError, match="expected a name"):
            tiles.tile(wrong)


def test_file_names() -> None:
    assert routes.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert routes.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
