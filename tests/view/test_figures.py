import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from lorsa_utils.exceptions import UserError
from lorsa_utils.view import figures

LAYERS = pd.DataFrame({"layer": [1, 9, 17] * 2, "module": ["Lorsa"] * 3 + ["SAE"] * 3})
LAYERS["fvu"] = [0.1, 0.2, 0.3, 0.05, 0.1, 0.2]


@pytest.fixture(autouse=True)
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "can_draw_png", lambda: False)


LABELS = {"title": "t", "x_title": "layer", "y_title": "FVU"}
DRAWINGS = {
    "lines": figures.lines(LAYERS, "layer", "fvu", "module", **LABELS),
    "one_line": figures.lines(LAYERS[:3], "layer", "fvu", **LABELS),
    "bars": figures.bars(LAYERS, "layer", "fvu", "module", **LABELS),
    "map": figures.new_figure("t", "source", "destination").add_heatmap(z=[[1, 2], [3, 4], [5, 6]]),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_drawing_has_titles_and_fits_600_pixels(name: str) -> None:
    layout = DRAWINGS[name].layout
    assert all(part.title.text for part in (layout, layout.xaxis, layout.yaxis))
    assert (layout.width or layout.template.layout.width) == 600


def test_lines_are_one_per_group_in_the_order_of_the_data() -> None:
    figure = DRAWINGS["lines"]
    assert [trace.name for trace in figure.data] == ["Lorsa", "SAE"]
    assert list(figure.data[1].y) == [0.05, 0.1, 0.2]
    assert len({trace.line.color for trace in figure.data} | {trace.marker.symbol for trace in figure.data}) == 4


def test_saved_figure_opens_offline_and_shares_one_plotly(tmp_path: Path) -> None:
    for name in ("P4_a", "P4_b"):
        saved = figures.save_figure(DRAWINGS["lines"], name, tmp_path, caption="Lower is <b>better</b>.")
    page = saved.read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page
    assert len(page) < 200_000
    assert "cdn" not in page
    names = {"P4_a.csv", "P4_a.html", "P4_b.csv", "P4_b.html", "plotly.min.js"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_csv_holds_the_given_numbers_or_those_of_the_traces(tmp_path: Path) -> None:
    figures.save_figure(DRAWINGS["lines"], "P4", tmp_path)
    table = pd.read_csv(tmp_path / "P4.csv")
    assert list(table["trace"]) == list(LAYERS["module"])
    assert np.allclose(table["y"], LAYERS["fvu"])
    figures.save_figure(DRAWINGS["lines"], "P4", tmp_path, LAYERS)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "P4.csv"), LAYERS)
    table = figures.figure_data(DRAWINGS["map"])
    assert table["z"].tolist() == [1, 2, 3, 4, 5, 6], "a map has one row per entry"
    assert table["y"].tolist() == [0, 0, 1, 1, 2, 2]


def test_image_is_written_when_it_can_be_drawn_and_an_old_one_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (b"png", None):
        monkeypatch.setattr(figures, "draw_png", lambda figure, image=image: image)
        file = figures.save_figure(DRAWINGS["bars"], "P8", tmp_path).with_suffix(".png")
        assert (file.read_bytes() if file.exists() else None) == image


def test_a_browser_that_fails_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: bool) -> None:
        raise RuntimeError("no display\nmore")

    monkeypatch.setattr(figures, "can_draw_png", lambda: True)
    monkeypatch.setattr("kaleido.start_sync_server", broken)
    for _ in range(2):
        assert figures.draw_png(DRAWINGS["bars"]) is None
        assert "no display" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "../x", "a/b", "P4 a"])
def test_names_that_cannot_be_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name"):
        figures.save_figure(DRAWINGS["bars"], name, tmp_path)


@pytest.mark.browser
def test_a_real_browser_draws_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not figures.can_draw_png():
        pytest.skip("no Chrome or Chromium here")
    small = go.Figure(DRAWINGS["lines"]).update_layout(width=300, height=200)
    for figure in (DRAWINGS["lines"], small):  # the second in the browser of the first
        image = figures.draw_png(figure)
        assert image is not None
        assert image.startswith(b"\x89PNG")
        width, height = (int.from_bytes(image[at : at + 4]) for at in (16, 20))
        size = figure.layout.width or figures.WIDTH, figure.layout.height or figures.HEIGHT
        assert (width, height) == tuple(1.5 * side for side in size)


def test_score_intervals_have_a_panel_for_each_score() -> None:
    places = itertools.product(("detection", "simulation"), ("Lorsa", "SAE"), (1, 17))
    data = pd.DataFrame(places, columns=["score", "dictionary", "layer"]).assign(mean=0.6, low=0.55, high=0.7)
    figure = figures.score_intervals(data)
    assert [trace.name for trace in figure.data] == ["Lorsa", "SAE", "Lorsa", "SAE"]
    assert list(figure.data[0].error_y.array) == pytest.approx([0.1, 0.1])
    assert list(figure.data[0].error_y.arrayminus) == pytest.approx([0.05, 0.05])
    assert [shape.y0 for shape in figure.layout.shapes] == [0.5, 0]
    assert list(figure.layout.xaxis.ticktext) == ["1", "17"]
