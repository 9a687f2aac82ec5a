"""Figures: plotly, one style, readable at 600 pixels; functions return a figure and never show it."""

from __future__ import annotations

import functools
import html
import itertools
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lorsa_utils import store
from lorsa_utils.exceptions import UserError

# Okabe and Ito's palette (2008), safe for colour-blind readers. Black comes last, as it is also the ink.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
WIDTH, HEIGHT = 600, 400

_AXIS = {
    "showgrid": True,
    "gridcolor": "#E6E6E6",
    "zeroline": False,
    "linecolor": "#444444",
    "ticks": "outside",
    "automargin": True,
}
TEMPLATE = go.layout.Template(
    layout=go.Layout(
        colorway=PALETTE,
        width=WIDTH,
        height=HEIGHT,
        font={"family": "DejaVu Sans, Arial, sans-serif", "size": 13, "color": "#222222"},
        title={"font": {"size": 15}, "x": 0, "xref": "paper", "xanchor": "left"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        legend={"bgcolor": "rgba(255,255,255,0.7)"},
        colorscale={"sequential": "Viridis", "diverging": "RdBu"},
        xaxis=_AXIS,
        # With a standoff the margin grows with the tick labels; without one long labels run into the title.
        yaxis=_AXIS | {"title": {"standoff": 8}},
    )
)


def new_figure(title: str, x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the house style; axis titles carry their units."""
    titles = {"title": {"text": title}, "xaxis": {"title": x_title}, "yaxis": {"title": y_title}}
    return go.Figure(layout={"template": TEMPLATE, **titles})


def series_style(number: int) -> dict[str, Any]:
    """Line and marker of the n-th series, with a colour and a symbol of its own."""
    colour = PALETTE[number % len(PALETTE)]
    marker = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8, "color": colour}
    return {"line": {"color": colour, "width": 2}, "marker": marker}


# ---- drawings


def lines(data: pd.DataFrame, x: str, y: str, by: str | None = None, **titles: str) -> go.Figure:
    """Lines with markers, one for each value of column `by`; `titles` as in `new_figure`."""
    figure = new_figure(**titles)
    for number, (name, rows) in enumerate(_series(data, by)):
        style = {"mode": "lines+markers", "showlegend": by is not None, **series_style(number)}
        figure.add_scatter(x=rows[x], y=rows[y], name=name, **style)
    return figure


def bars(data: pd.DataFrame, x: str, y: str, by: str | None = None, **titles: str) -> go.Figure:
    """Grouped bars over the categories in column `x`, one colour for each value of column `by`."""
    figure = new_figure(**titles)
    for number, (name, rows) in enumerate(_series(data, by)):
        style = {"marker_color": PALETTE[number % len(PALETTE)], "showlegend": by is not None}
        figure.add_bar(x=rows[x].astype(str), y=rows[y], name=name, **style)
    return figure.update_layout(barmode="group", xaxis_type="category")


def _series(data: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    return [("", data)] if by is None else [(str(name), rows) for name, rows in data.groupby(by, sort=False)]


def score_intervals(data: pd.DataFrame, title: str = "P6: detection scores", chance: float = 0.5) -> go.Figure:
    """Means with intervals over layers, one colour per dictionary, one panel per score; a dashed line at `chance`.

    `data` has columns `dictionary`, `layer`, `score`, `mean`, `low`, `high`. Correlations have their chance at 0.
    """
    scores, layers = list(dict.fromkeys(data["score"])), sorted(set(data["layer"]))
    alike = "simulation" not in scores
    spacing = 0.04 if alike else 0.08
    figure = make_subplots(cols=len(scores), subplot_titles=scores, horizontal_spacing=spacing, shared_yaxes=alike)
    for panel, score in enumerate(scores, start=1):
        place = {"row": 1, "col": panel}
        for number, (name, rows) in enumerate(data[data["score"] == score].groupby("dictionary", sort=False)):
            error = {"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"], "symmetric": False}
            style = {"mode": "markers", "marker": series_style(number)["marker"], "error_y": error}
            # Dictionaries are moved apart, so that intervals do not hide each other.
            x = [layers.index(layer) + 0.14 * number for layer in rows["layer"]]
            legend = {"name": str(name), "legendgroup": str(name), "showlegend": panel == 1}
            figure.add_scatter(x=x, y=rows["mean"], **style, **legend, **place)
        line = {"dash": "dash", "color": "#888888", "width": 1}
        figure.add_hline(y=0 if score == "simulation" else chance, line=line, **place)
    ticks = {"tickvals": [i + 0.07 for i in range(len(layers))], "ticktext": [str(layer) for layer in layers]}
    figure.update_xaxes(title="layer", range=[-0.4, len(layers) - 0.4], **ticks)
    if alike:
        low, high = min(chance - 0.1, data["low"].min() - 0.02), max(chance + 0.1, data["high"].max() + 0.04)
        figure.update_yaxes(range=[low, high])
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=420, margin={"t": 110})
    return figure.update_layout(legend={"orientation": "h", "y": 1.22, "x": 1.0, "xanchor": "right"})


def table_figure(data: pd.DataFrame, title: str, widths: Sequence[float] | None = None) -> go.Figure:
    """A table as a figure; `widths` of the columns are relative."""
    columns = [data[name].astype(str).tolist() for name in data.columns]
    style: dict[str, Any] = {"align": "left", "line": {"color": "#CCCCCC"}, "height": 30}
    header = {"values": [f"<b>{name}</b>" for name in data.columns], "fill": {"color": "#E8EEF3"}, **style}
    cells = {"values": columns, "fill": {"color": "white"}, **style}
    figure = go.Figure(go.Table(columnwidth=widths, header=header, cells=cells))
    margin, height = {"l": 10, "r": 10, "b": 10}, 110 + 38 * (len(data) + 1)
    return figure.update_layout(template=TEMPLATE, title={"text": title}, height=height, margin=margin)


# ---- saving


def save_figure(
    figure: go.Figure, name: str, folder: str | Path, data: pd.DataFrame | None = None, caption: str = ""
) -> Path:
    """Write `<name>.csv`, `<name>.html` and, where a browser can draw it, `<name>.png` into `folder`.

    `data` are the numbers, by default those of the traces; the caption is shown below the interactive figure. Returns
    the path of the HTML, which needs plotly.min.js of its folder.

    Raises:
        UserError: the name is impossible or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"{name!r} cannot name a figure's files; use letters, digits, _ and -.")
    target = store.require_writable(folder)
    page, csv, png = (target / f"{name}.{ending}" for ending in ("html", "csv", "png"))
    store.write_text(csv, (figure_data(figure) if data is None else data).to_csv(index=False))
    shown = go.Figure(figure)
    if caption:
        _add_caption(shown, caption)
    with store.atomic_path(page) as temporary:
        shown.write_html(temporary, include_plotlyjs="directory", full_html=True)
    if image := draw_png(figure):
        store.write_bytes(png, image)
    else:
        png.unlink(missing_ok=True)  # an image of an earlier run would not show this figure
    return page


def _add_caption(figure: go.Figure, caption: str) -> None:
    wrapped = textwrap.wrap(caption, 90)
    text = "<br>".join(html.escape(line) for line in wrapped)
    at = {"x": 0, "y": 0, "yshift": -70, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    figure.add_annotation(text=text, align="left", showarrow=False, font={"size": 11}, **at)
    bottom = 85 + 15 * len(wrapped)
    figure.update_layout(height=(figure.layout.height or HEIGHT) + bottom - 60, margin={"b": bottom})


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """The numbers in its traces, one row per point: `trace`, `x`, `y` and, for maps, `z`."""
    rows: list[dict[str, Any]] = []
    for number, trace in enumerate(figure.data):
        name = trace.name or str(number)
        x, y, z = (getattr(trace, side, None) for side in ("x", "y", "z"))
        if z is not None:
            xs, ys = (range(n) if side is None else side for side, n in ((x, len(z[0])), (y, len(z))))
            places = zip(itertools.product(ys, xs), itertools.chain(*z), strict=True)
            rows += [{"trace": name, "x": a, "y": b, "z": value} for (b, a), value in places]
        elif x is not None or y is not None:
            xs, ys = (itertools.count() if side is None else side for side in (x, y))
            rows += [{"trace": name, "x": a, "y": b} for a, b in zip(xs, ys, strict=False)]
    return pd.DataFrame(rows)


def draw_png(figure: go.Figure) -> bytes | None:
    """A PNG with 1.5 pixels per unit, or None when no browser can draw it. Never fails."""
    if not can_draw_png():
        return None
    import kaleido

    try:
        # One Chromium for all figures of a process: it takes seconds to start.
        kaleido.start_sync_server(mathjax=False, silence_warnings=True)
        with warnings.catch_warnings(action="ignore"):  # plotly's options, none of which is set, do not reach a server
            return bytes(figure.to_image(format="png", scale=1.5))
    except Exception as error:  # a missing image must not end a run
        kaleido.stop_sync_server(silence_warnings=True)
        first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"No static image could be drawn ({first_line}); the interactive figure is there.", file=sys.stderr)
        return None


@functools.cache
def can_draw_png() -> bool:
    """Whether kaleido and a Chrome or Chromium are installed; reported missing only once."""
    if os.environ.get("LORSA_STATIC_IMAGES") == "0":
        return False
    try:
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium

        found = Chromium.find_browser(skip_local=False)
    except Exception:
        found = None
    if not found:
        print("No Chrome or Chromium found: figures are saved as HTML and CSV, without static images.", file=sys.stderr)
    return bool(found)
