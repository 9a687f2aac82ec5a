import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from lorsa_utils.exceptions import UserError
from lorsa_utils.view import figures

LAYERS = pd.DataFrame(
    {
        "layer": [1, 9, 17, 1, 9, 17],
        "module": ["Lorsa"] * 3 + ["SAE"] * 3,
        "fvu": [0.1, 0.2, 0.3, 0.05, 0.1, 0.2],
        "ce_recovered": [0.9, 0.8, 0.7, 0.95, 0.9, 0.85],
    }
)
EFFECTS = pd.DataFrame(
    {"name": ["a", "b"], "labelled": [0.1, 0.3], "labelled_error": [0.01, 0.2], "clear": [True, False]}
)
SHARES = pd.DataFrame({"t": [0.5, 0.5], "one": [0.25, 0.5], "more": [0.75, 0.5], "of": ["heads", "null"]})
ROWS = [{"tokens": t, "fvu": 1 / t, "dead_fraction": 0.1} for t in (1, 10, 100)]


@pytest.fixture(autouse=True)
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "can_draw_png", lambda: False)


def drawings() -> dict[str, go.Figure]:
    return {
        "lines": figures.lines(LAYERS, "layer", "fvu", "module", title="t", x_title="layer", y_title="FVU"),
        "one_line": figures.lines(LAYERS[:3], "layer", "fvu", title="t", x_title="layer", y_title="FVU"),
        "bars": figures.bars(LAYERS, "layer", "fvu", "module", title="t", x_title="layer", y_title="FVU"),
        "training_curves": figures.training_curves({"Lorsa": ROWS, "SAE": ROWS}),
        "layer_fvu": figures.layer_fvu(LAYERS),
        "scatter_fvu": figures.scatter_fvu(
            pd.DataFrame({"layer": [1, 2, 3], "lorsa": [0.1, 0.2, 0.3], "sae": [0.2, 0.4, 0.6]})
        ),
        "loss_recovered": figures.loss_recovered(LAYERS),
        "sink_bars": figures.sink_bars([0.2, 0.9]),
        "token_profile": figures.token_profile([0.0, 2.0], ["a", "a"], [1], title="t", y_title="activation"),
        "share_distribution": figures.share_distribution(
            pd.DataFrame({"kind": ["a", "a", "b"], "share": [0.1, 0.9, 0.2]}), 0.5
        ),
        "precision_recall": figures.precision_recall(
            pd.DataFrame({"kind": ["a", "b"], "precision": [0.6, 0.9], "recall": [0.1, 0.2]})
        ),
        "effects": figures.effects(EFFECTS),
        "stacked_shares": figures.stacked_shares(
            SHARES, "t", ["one", "more"], "of", title="t", x_title="share", y_title="heads"
        ),
        "overlaps": figures.overlaps(pd.DataFrame({"pair": ["a", "a", "b"], "overlap": [0.1, 0.2, 0.9]})),
        "pattern_heatmap": figures.pattern_heatmap(np.eye(3), ["a", "b", "c"]),
    }


@pytest.mark.parametrize("name", sorted(drawings()))
def test_every_drawing_has_titles_and_fits_600_pixels(name: str) -> None:
    figure = drawings()[name]
    assert figure.layout.title.text
    assert (figure.layout.width or figure.layout.template.layout.width) == 600
    axes = [axis for axis in figure.layout if re.match(r"[xy]axis", axis)]
    titled = [axis for axis in axes if figure.layout[axis].title.text]
    assert {axis[0] for axis in titled} == {"x", "y"}


def test_lines_are_one_per_group_in_the_order_of_the_data() -> None:
    figure = drawings()["layer_fvu"]
    assert [trace.name for trace in figure.data] == ["Lorsa", "SAE"]
    assert list(figure.data[1].y) == [0.05, 0.1, 0.2]
    assert len({trace.line.color for trace in figure.data} | {trace.marker.symbol for trace in figure.data}) == 4


def test_repeated_tokens_keep_bars_of_their_own() -> None:
    bars = drawings()["token_profile"].data[0]
    assert list(bars.x) == ["0 a", "1 a"]
    assert len(set(bars.marker.color)) == 2, "the marked one has another colour"


def test_share_distribution_falls_from_one() -> None:
    first = drawings()["share_distribution"].data[0]
    assert (list(first.x), list(first.y)) == ([0.1, 0.9], [1.0, 0.5])


def test_effects_are_ordered_with_the_largest_on_top() -> None:
    figure = drawings()["effects"]
    assert list(figure.layout.yaxis.categoryarray) == ["a", "b"]
    clear, rest = figure.data
    assert (list(clear.y), list(clear.error_x.array)) == (["a"], [0.02])
    assert list(rest.y) == ["b"]


def test_stacked_shares_have_a_panel_for_each_kind_and_fill_them() -> None:
    figure = drawings()["stacked_shares"]
    assert [(trace.name, trace.xaxis, trace.y[0]) for trace in figure.data] == [
        ("one", "x", 0.25),
        ("more", "x", 0.75),
        ("one", "x2", 0.5),
        ("more", "x2", 0.5),
    ]


def test_scatter_tells_the_correlation_from_three_layers_on() -> None:
    two = pd.DataFrame({"layer": [1, 2], "lorsa": [0.1, 0.2], "sae": [0.2, 0.4]})
    assert "r = 1.00 over 3 layers" in drawings()["scatter_fvu"].layout.annotations[0].text
    assert not figures.scatter_fvu(two).layout.annotations


def test_pattern_leaves_the_future_blank_and_diverges_from_zero_when_signed() -> None:
    figure = figures.pattern_heatmap([[1.0, 5.0], [-0.5, 0.5]], ["a", "a"])
    values = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(values[0, 1])
    assert values[1, 0] == -0.5
    assert figure.data[0].zmid == 0
    assert list(figure.data[0].x) == ["0 a", "1 a"], "equal tokens stay apart"


def test_saved_figure_opens_offline_and_shares_one_plotly(tmp_path: Path) -> None:
    for name in ("P4_a", "P4_b"):
        saved = figures.save_figure(drawings()["layer_fvu"], name, tmp_path, caption="Lower is <b>better</b>.")
        assert saved.png is None
    page = (tmp_path / "P4_a.html").read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page
    assert len(page) < 200_000
    assert "cdn" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "P4_a.csv",
        "P4_a.html",
        "P4_b.csv",
        "P4_b.html",
        "plotly.min.js",
    ]


def test_csv_holds_the_given_numbers_or_those_of_the_traces(tmp_path: Path) -> None:
    figures.save_figure(drawings()["layer_fvu"], "own", tmp_path)
    own = pd.read_csv(tmp_path / "own.csv")
    assert list(own["trace"]) == list(LAYERS["module"])
    assert np.allclose(own["y"], LAYERS["fvu"])
    given = figures.save_figure(drawings()["layer_fvu"], "given", tmp_path, LAYERS)
    pd.testing.assert_frame_equal(pd.read_csv(given.csv), LAYERS)


def test_csv_of_a_map_has_one_row_an_entry() -> None:
    table = figures.figure_data(drawings()["pattern_heatmap"])
    assert len(table) == 9
    assert table["z"].sum() == 3


def test_image_is_written_when_it_can_be_drawn_and_an_old_one_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "draw_png", lambda figure: b"png")
    saved = figures.save_figure(drawings()["sink_bars"], "P8", tmp_path)
    assert saved.png is not None
    assert saved.png.read_bytes() == b"png"
    monkeypatch.setattr(figures, "draw_png", lambda figure: None)
    assert figures.save_figure(drawings()["sink_bars"], "P8", tmp_path).png is None
    assert not (tmp_path / "P8.png").exists()


def test_a_browser_that_fails_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> bytes:
        raise RuntimeError("no display\nmore")

    monkeypatch.setattr(figures, "can_draw_png", lambda: True)
    monkeypatch.setattr(go.Figure, "to_image", fail)
    assert figures.draw_png(drawings()["sink_bars"]) is None
    assert "no display" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "../x", "a/b", "P4 a"])
def test_names_that_cannot_be_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name"):
        figures.save_figure(drawings()["sink_bars"], name, tmp_path)


def test_figures_are_json(tmp_path: Path) -> None:
    for figure in drawings().values():
        json.loads(figure.to_json())


@pytest.mark.browser
def test_a_real_browser_draws_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not figures.can_draw_png():
        pytest.skip("no Chrome or Chromium here")
    image = figures.draw_png(drawings()["layer_fvu"])
    assert image is not None
    assert image.startswith(b"\x89PNG")


TILES = pd.DataFrame(
    [
        ["forward", 0, 4, 0, 4, 0.6],
        ["forward", 4, 8, 0, 4, 1.0],
        ["forward", 4, 8, 4, 8, 0.6],
        ["keys", 0, 3, 0, 4, 0.7],
    ],
    columns=["kernel", "query", "query_end", "key", "key_end", "used"],
)


def test_tiles_are_rectangles_in_the_panel_of_their_kernel() -> None:
    figure = figures.attention_tiles(TILES)
    assert [note.text for note in figure.layout.annotations] == ["forward", "keys"]
    full, masked, none, few = figure.data
    assert (list(full.x), list(full.y)) == ([0, 4, 4, 0, 0, None], [4, 4, 8, 8, 4, None])
    assert list(masked.x).count(None) == 2
    assert not none.x
    assert (few.xaxis, few.fillcolor) == ("x2", masked.fillcolor)
    assert full.fillcolor != masked.fillcolor
    assert figure.layout.yaxis.range == (8, 0), "the first query is on top"
    assert sum(trace.showlegend for trace in figure.data) == 2


def test_operand_maps_have_a_panel_each() -> None:
    maps = {f"head {number}": np.arange(16.0).reshape(4, 4) * number for number in range(5)}
    figure = figures.operand_maps(maps, low=10)
    assert [trace.name for trace in figure.data] == list(maps)
    assert list(figure.data[0].x) == [10, 11, 12, 13]
    assert len({trace.yaxis for trace in figure.data}) == 5
    assert figure.data[2].z[1][2] == 12
    assert len(figures.operand_maps({"one": np.eye(3)}).data) == 1


def test_family_map_names_families_with_their_size() -> None:
    data = pd.DataFrame(
        {
            "family": ["induction", "sink"],
            0: [0.9, 0.5],
            1: [0.1, 0.5],
            "lorsa_heads": [12, 3],
            "mhsa_heads": [1.2, 2.0],
        }
    )
    figure = figures.family_map(data)
    assert list(figure.data[0].y) == ["induction (12 heads)", "sink (3 heads)"]
    assert np.asarray(figure.data[0].z).tolist() == [[0.9, 0.1], [0.5, 0.5]]


def test_score_intervals_have_a_panel_for_each_score() -> None:
    rows = [
        (name, layer, score, 0.6, 0.55, 0.7)
        for score in ("detection", "simulation")
        for name in ("Lorsa", "SAE")
        for layer in (1, 17)
    ]
    data = pd.DataFrame(rows, columns=["dictionary", "layer", "score", "mean", "low", "high"])
    figure = figures.score_intervals(data)
    assert [trace.name for trace in figure.data] == ["Lorsa", "SAE", "Lorsa", "SAE"]
    assert list(figure.data[0].error_y.array) == pytest.approx([0.1, 0.1])
    assert list(figure.data[0].error_y.arrayminus) == pytest.approx([0.05, 0.05])
    assert [shape.y0 for shape in figure.layout.shapes] == [0.5, 0]
    assert list(figure.layout.xaxis.ticktext) == ["1", "17"]


def test_intervals_stand_side_by_side() -> None:
    rows = [
        (kind, name, value, value - 0.1, value + 0.2)
        for kind, value in (("digit", 0.5), ("word start", 0.6))
        for name in ("Lorsa", "SAE")
    ]
    data = pd.DataFrame(rows, columns=["kind", "module", "value", "low", "high"])
    figure = figures.intervals(data, "kind", "module", title="t", x_title="x", y_title="y")
    assert [trace.name for trace in figure.data] == ["Lorsa", "SAE"]
    assert list(figure.layout.xaxis.ticktext) == ["digit", "word start"]
    for trace, side in zip(figure.data, (-1, 1), strict=True):
        assert [side * (place - category) > 0 for place, category in zip(trace.x, (0, 1), strict=True)] == [True, True]
        assert list(trace.error_y.array) == pytest.approx([0.2, 0.2])
        assert list(trace.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert [shape.y0 for shape in figure.layout.shapes] == [0]
    assert not figures.intervals(data, "kind", "module", title="t", x_title="x", y_title="y", line=None).layout.shapes
