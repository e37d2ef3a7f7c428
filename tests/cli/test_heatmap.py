"""The picture shows the right numbers in the right places."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from peftkernels.cli.report.heatmap import RankHistory, layers_and_projections, write_heatmap

MODULES = [
    "encoder.layer.0.query",
    "encoder.layer.0.output.dense",
    "encoder.layer.1.query",
    "encoder.layer.1.output.dense",
]
LIVE = [[12, 12, 12, 12], [12, 7, 3, 0]]


def test_names_are_split_at_the_layer_number() -> None:
    assert layers_and_projections([*MODULES[:2], "embeddings.project"]) == [
        (0, "query"),
        (0, "output.dense"),
        (None, "embeddings.project"),
    ]


def test_two_stacks_keep_their_names() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q"]
    assert layers_and_projections(names) == [(0, "encoder.block.q"), (0, "decoder.block.q")]


def test_history_is_arranged_by_projection_and_layer() -> None:
    history = RankHistory([*MODULES, "extra"], [[*row, 5] for row in LIVE])
    assert history.projections == ["query", "output.dense", "extra"]
    assert history.layers == [0, 1, None]
    np.testing.assert_array_equal(history.over_time("query")[:2], [[12, 12], [12, 3]])
    assert np.isnan(history.over_time("query")[2]).all()
    np.testing.assert_array_equal(history.final()[1], [7, 0, np.nan])
    np.testing.assert_array_equal(history.totals(), [53, 27])


def test_picture_is_a_png_whose_colours_follow_the_ranks(tmp_path: Path) -> None:
    def draw(name: str, live: list[list[int]]) -> np.ndarray:
        path = tmp_path / name
        write_heatmap(path, MODULES, live, most=12, title="ranks", budget=[48, 24], schedule=(0, 2))
        assert path.read_bytes().startswith(b"\x89PNG")
        return matplotlib.image.imread(path)

    picture = draw("a.png", LIVE)
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert not np.array_equal(picture, draw("b.png", [LIVE[0], LIVE[0]]))
    np.testing.assert_array_equal(picture, draw("c.png", LIVE))
