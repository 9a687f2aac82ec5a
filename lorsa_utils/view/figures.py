"""Figures: plotly, one style, readable at 600 pixels; functions return a figure and never show it.

`save_figure` writes what a reader needs: an interactive page (plotly.js lies once beside all pages of a folder), a
static image when a Chrome or Chromium is there to draw it, and the numbers as CSV.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lorsa_utils import store
from lorsa_utils.exceptions import UserError

# Okabe and Ito's palette (2008): told apart with every common colour blindness. Black comes last, it is also the ink.
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
    return go.Figure(
        layout={
            "template": TEMPLATE,
            "title": {"text": title},
            "xaxis": {"title": x_title},
            "yaxis": {"title": y_title},
        }
    )


def series_style(number: int) -> dict[str, Any]:
    """Line and marker of the n-th series; colour and symbol both tell it apart."""
    colour = PALETTE[number % len(PALETTE)]
    marker = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8, "color": colour}
    return {"line": {"color": colour, "width": 2}, "marker": marker}


# ---- drawings


def lines(
    data: pd.DataFrame, x: str, y: str, by: str | None = None, *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Lines with markers over the columns `x` and `y`, one for each value of column `by`."""
    figure = new_figure(title, x_title, y_title)
    for number, (name, rows) in enumerate(_series(data, by)):
        style = series_style(number)
        figure.add_scatter(x=rows[x], y=rows[y], name=name, mode="lines+markers", showlegend=by is not None, **style)
    return figure


def bars(
    data: pd.DataFrame, x: str, y: str, by: str | None = None, *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Grouped bars of column `y` over the categories in column `x`, one colour for each value of column `by`."""
    figure = new_figure(title, x_title, y_title)
    for number, (name, rows) in enumerate(_series(data, by)):
        colour = PALETTE[number % len(PALETTE)]
        figure.add_bar(x=rows[x].astype(str), y=rows[y], name=name, marker_color=colour, showlegend=by is not None)
    return figure.update_layout(barmode="group", xaxis_type="category")


def _series(data: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    return [("", data)] if by is None else [(str(name), rows) for name, rows in data.groupby(by, sort=False)]


def pattern_heatmap(
    pattern: Any, tokens: Sequence[str], title: str = "Attention pattern", value: str = "attention"
) -> go.Figure:
    """A map of destinations (rows) by sources (columns).

    Args:
        pattern: [length, length]; entries above the diagonal are left blank. With negative entries the colours diverge
            from 0.
        tokens: text of the tokens, [length].
        title: of the figure.
        value: what an entry is, for the colour bar.
    """
    values = np.array(pattern, dtype=float)
    values[np.triu_indices(len(values), 1)] = np.nan
    names = [f"{position} {token}" for position, token in enumerate(tokens)]
    figure = new_figure(title, "source token", "destination token")
    scale: dict[str, Any] = {"colorscale": "Viridis", "zmin": 0}
    if np.nanmin(values) < 0:
        scale = {"colorscale": "RdBu", "zmid": 0}
    figure.add_heatmap(z=values, x=names, y=names, colorbar={"title": value}, hoverongaps=False, **scale)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    # Token names take the left third of the figure; a title over the map alone would be cut.
    figure.update_layout(height=520, title={"xref": "container", "x": 0.02})
    return figure


# ---- saving


@dataclass(frozen=True)
class SavedFigure:
    """Where a figure's files are."""

    html: Path
    """Interactive page; needs plotly.min.js of the same folder."""
    csv: Path
    """The numbers."""
    png: Path | None
    """Static image, None where no browser could draw it."""


def save_figure(
    figure: go.Figure, name: str, folder: str | Path, data: pd.DataFrame | None = None, caption: str = ""
) -> SavedFigure:
    """Write `<name>.html`, `<name>.csv` and, when it can be drawn, `<name>.png` into `folder`.

    Args:
        figure: what to save.
        name: file name without an ending: letters, digits, `_`, `-` and `.`.
        folder: made when missing.
        data: the numbers; taken from the figure's traces when not given.
        caption: shown below the interactive figure.

    Raises:
        UserError: the name is impossible or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"{name!r} cannot name a figure's files; use letters, digits, _ and -.")
    target = store.require_writable(folder)
    table = figure_data(figure) if data is None else data
    store.write_text(target / f"{name}.csv", table.to_csv(index=False))
    shown = go.Figure(figure)
    if caption:
        _add_caption(shown, caption)
    with store.atomic_path(target / f"{name}.html") as temporary:
        shown.write_html(temporary, include_plotlyjs="directory", full_html=True)
    png = target / f"{name}.png"
    image = draw_png(figure)
    if image is None:
        png.unlink(missing_ok=True)  # an image of an earlier run would not show this figure
        return SavedFigure(target / f"{name}.html", target / f"{name}.csv", None)
    store.write_bytes(png, image)
    return SavedFigure(target / f"{name}.html", target / f"{name}.csv", png)


def _add_caption(figure: go.Figure, caption: str) -> None:
    """Put a wrapped caption below the axes."""
    import html

    wrapped = textwrap.wrap(caption, 90)
    figure.add_annotation(
        text="<br>".join(html.escape(line) for line in wrapped),
        x=0,
        y=0,
        yshift=-70,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        font={"size": 11},
    )
    bottom = 85 + 15 * len(wrapped)
    height = figure.layout.height or HEIGHT
    figure.update_layout(height=height + bottom - 60, margin={"b": bottom})


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """The numbers in a figure's traces, one row a point: `trace`, `x`, `y` and, for maps, `z`."""
    rows: list[dict[str, Any]] = []
    for number, trace in enumerate(figure.data):
        name = trace.name or str(number)
        x, y, z = (getattr(trace, side, None) if side in trace else None for side in ("x", "y", "z"))
        if z is not None:
            for i, line in enumerate(z):
                for j, value in enumerate(line):
                    rows.append(
                        {
                            "trace": name,
                            "x": x[j] if x is not None else j,
                            "y": y[i] if y is not None else i,
                            "z": value,
                        }
                    )
        elif x is not None or y is not None:
            points = max(len(side) for side in (x, y) if side is not None)
            xs, ys = (range(points) if side is None else side for side in (x, y))
            rows += [{"trace": name, "x": a, "y": b} for a, b in zip(xs, ys, strict=True)]
    return pd.DataFrame(rows)


def draw_png(figure: go.Figure) -> bytes | None:
    """The figure as a PNG (1.5 pixels a unit), or None when no Chrome or Chromium can draw it. Never fails."""
    if not can_draw_png():
        return None
    try:
        return figure.to_image(format="png", scale=1.5)
    except Exception as error:  # whatever the browser has to say, a missing image must not end a run
        first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"No static image could be drawn ({first_line}); the interactive figure is there.", file=sys.stderr)
        return None


@functools.cache
def can_draw_png() -> bool:
    """Whether kaleido and a Chrome or Chromium are installed; looked up once, and said once when they are not."""
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


# ---- tables and maps


def toy_shares(shares: Any, units: Sequence[str], title: str = "P1: how MHSA heads share the true units") -> go.Figure:
    """A map of MHSA heads (columns) by true units (rows), each cell with its share of the unit.

    Args:
        shares: [n_units, n_heads], rows sum to 1.
        units: names, [n_units].
        title: of the figure.
    """
    values = np.asarray(shares, dtype=float)
    figure = new_figure(title, "MHSA head", "true unit")
    figure.add_heatmap(
        z=values,
        x=[str(head) for head in range(values.shape[1])],
        y=list(units),
        zmin=0,
        zmax=1,
        colorscale="Blues",
        texttemplate="%{z:.0%}",
        colorbar={"title": "share", "tickformat": ".0%"},
    )
    _as_map(figure, len(values))
    return figure


def _as_map(figure: go.Figure, rows: int) -> None:
    """Categories on both axes, first row on top, a height that keeps row names apart."""
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    figure.update_layout(height=140 + 26 * rows)


def toy_table(data: pd.DataFrame, title: str, widths: Sequence[float] | None = None) -> go.Figure:
    """A table as a figure, so that it is saved like one.

    Args:
        data: columns become the header.
        title: of the figure.
        widths: of the columns, relative.
    """
    columns = [data[name].astype(str).tolist() for name in data.columns]
    style: dict[str, Any] = {"align": "left", "line": {"color": "#CCCCCC"}, "height": 30}
    figure = go.Figure(
        go.Table(
            columnwidth=widths,
            header={"values": [f"<b>{name}</b>" for name in data.columns], "fill": {"color": "#E8EEF3"}, **style},
            cells={"values": columns, "fill": {"color": "white"}, **style},
        )
    )
    figure.update_layout(
        template=TEMPLATE, title={"text": title}, height=110 + 38 * (len(data) + 1), margin={"l": 10, "r": 10, "b": 10}
    )
    return figure


# ---- head discovery


def token_profile(
    values: Sequence[float], tokens: Sequence[str], marked: Sequence[int] = (), *, title: str, y_title: str
) -> go.Figure:
    """One number for each token of a text, as bars; some of them marked by colour.

    Args:
        values: [length].
        tokens: text of the tokens, [length].
        marked: positions in another colour.
        title: of the figure.
        y_title: with its unit.
    """
    names = [f"{position} {token}" for position, token in enumerate(tokens)]
    figure = new_figure(title, "token", y_title)
    colours = [PALETTE[1] if position in set(marked) else PALETTE[0] for position in range(len(names))]
    figure.add_bar(x=names, y=np.asarray(values, dtype=float), marker_color=colours)
    figure.update_xaxes(type="category", tickangle=-90)
    return figure


def share_distribution(
    data: pd.DataFrame, bar: float, title: str = "P7: how much of a pattern lies on the predicted source"
) -> go.Figure:
    """For each kind of units, the share of units above every value: real ones beside their null.

    Args:
        data: columns `kind` and `share`, one row a unit.
        bar: the share that a name asks for.
        title: of the figure.
    """
    figure = new_figure(title, "share of the pattern on the predicted source", "units above (share)")
    for number, (kind, part) in enumerate(data.groupby("kind", sort=False)):
        values = np.sort(part["share"].dropna().to_numpy())
        above = 1 - np.arange(len(values)) / max(1, len(values))
        style = {
            "color": PALETTE[number],
            "width": 2,
            "dash": ("solid", "dash", "dot", "dashdot")[number % 4],
            "shape": "vh",
        }
        figure.add_scatter(x=values, y=above, mode="lines", name=f"{kind} ({len(values)})", line=style)
    figure.add_vline(
        x=bar, line={"color": "#444444", "dash": "dot"}, annotation_text="bar", annotation_position="top left"
    )
    figure.update_xaxes(range=[0, 1.02])
    figure.update_yaxes(type="log", dtick=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0}, height=HEIGHT + 40)
    return figure


def precision_recall(data: pd.DataFrame, title: str = "P7: precision and recall of single units") -> go.Figure:
    """Units as points, precision against recall, one colour and symbol for each kind.

    Args:
        data: columns `kind`, `precision` and `recall`, one row a unit.
        title: of the figure.
    """
    figure = new_figure(title, "recall (share of labelled positions found)", "precision")
    for number, (kind, part) in enumerate(data.groupby("kind", sort=False)):
        marker = {"symbol": SYMBOLS[number], "size": 8, "color": PALETTE[number], "opacity": 0.7}
        figure.add_scatter(
            x=part["recall"], y=part["precision"], mode="markers", name=f"{kind} ({len(part)})", marker=marker
        )
    figure.update_xaxes(range=[-0.02, 1.02])
    figure.update_yaxes(range=[-0.02, 1.02])
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0}, height=HEIGHT + 40)
    return figure


def effects(data: pd.DataFrame, title: str = "P7: what removing one head costs") -> go.Figure:
    """Effects of removals with two standard errors, the largest on top.

    Args:
        data: columns `name`, `labelled`, `labelled_error` and `clear` (whether the effect is told from zero).
        title: of the figure.
    """
    figure = new_figure(title, "increase of the loss at labelled positions (nats)", "removed")
    ordered = data.sort_values("labelled")
    for number, (clear, name) in enumerate(((True, "above zero (Holm, 5 %)"), (False, "not told from zero"))):
        part = ordered[ordered["clear"] == clear]
        bars_of = {"array": 2 * part["labelled_error"], "color": "#888888"}
        marker = {"symbol": SYMBOLS[number], "size": 9, "color": PALETTE[number]}
        figure.add_scatter(
            x=part["labelled"], y=part["name"], error_x=bars_of, mode="markers", marker=marker, name=name
        )
    figure.add_vline(x=0, line={"color": "#444444"})
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=ordered["name"].tolist())
    figure.update_layout(height=210 + 22 * len(data), margin={"t": 110, "b": 90}, title={"y": 0.95, "yanchor": "top"})
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    return figure


def stacked_shares(
    data: pd.DataFrame, x: str, parts: Sequence[str], panel: str, *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Stacked bars that sum to one, side by side for each value of column `panel`.

    Args:
        data: column `x`, columns `parts` (shares), column `panel`.
        x: column of the horizontal axis.
        parts: columns to stack, from below.
        panel: column that separates the panels.
        title: of the figure.
        x_title: with its unit.
        y_title: with its unit.
    """
    names = list(dict.fromkeys(data[panel]))
    figure = make_subplots(
        cols=len(names), shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=[str(name) for name in names]
    )
    for column, name in enumerate(names, 1):
        part = data[data[panel] == name]
        for number, piece in enumerate(parts):
            colour = PALETTE[number % len(PALETTE)]
            style = {"marker_color": colour, "name": piece, "legendgroup": piece, "showlegend": column == 1}
            figure.add_bar(x=part[x].astype(str), y=part[piece], row=1, col=column, **style)
    figure.update_layout(
        template=TEMPLATE, barmode="stack", title={"text": title, "y": 0.95, "yanchor": "top"}, height=HEIGHT + 60
    )
    figure.update_layout(margin={"t": 110}, legend={"orientation": "h", "y": -0.25, "x": 0})
    figure.update_xaxes(title=x_title, type="category")
    figure.update_yaxes(title=y_title, range=[0, 1], col=1)
    return figure


def overlaps(data: pd.DataFrame, title: str = "P13: are QK groups copies of MHSA heads?") -> go.Figure:
    """Distributions of pattern overlaps, one box with its points for each kind of pair.

    Args:
        data: columns `pair` (kind of pair) and `overlap`.
        title: of the figure.
    """
    figure = new_figure(title, "overlap of attention patterns (1: equal)", "pair of patterns")
    for number, (pair, part) in enumerate(data.groupby("pair", sort=False)):
        colour = PALETTE[number % len(PALETTE)]
        marker = {"color": colour, "size": 4, "opacity": 0.5}
        figure.add_box(
            x=part["overlap"],
            name=str(pair),
            marker=marker,
            line={"color": colour},
            boxpoints="all",
            jitter=0.6,
            pointpos=0,
        )
    figure.update_xaxes(range=[0, 1.02])
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        showlegend=False,
        height=150 + 55 * data["pair"].nunique(),
        title={"xref": "container", "x": 0.02},
        margin={"t": 80},
    )
    return figure


def operand_maps(maps: Mapping[str, Any], low: int = 0, title: str = "P9: activation at `=`") -> go.Figure:
    """Activations over the operand grid, one square panel a head, at most three in a row; colours are each panel's own.

    Args:
        maps: name of a panel (its rule, say) to activations [n, n], rows are op1, columns op2.
        low: smallest operand.
        title: of the figure.
    """
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=list(maps), horizontal_spacing=0.09, vertical_spacing=0.28 / rows
    )
    for number, (name, values) in enumerate(maps.items()):
        z = np.asarray(values, dtype=float)
        operands = list(range(low, low + len(z)))
        place = {"row": number // columns + 1, "col": number % columns + 1}
        figure.add_heatmap(
            z=z, x=operands, y=operands, colorscale="Viridis", zmin=0, showscale=False, name=name, **place
        )
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=90 + 230 * rows, margin={"t": 90})
    figure.update_annotations(font_size=11)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(title="op2", row=rows)
    figure.update_yaxes(title="op1", col=1)
    return figure


def family_map(data: pd.DataFrame, title: str = "P12: which MHSA heads carry which families") -> go.Figure:
    """Mean shares of MHSA heads (columns) in the Lorsa heads of each family (rows).

    Args:
        data: of `correspondence.family_shares`: `family`, `lorsa_heads`, and a column for each MHSA head.
        title: of the figure.
    """
    heads = [column for column in data.columns if isinstance(column, int)]
    names = [f"{row.family} ({row.lorsa_heads} heads)" for row in data.itertuples()]
    figure = toy_shares(data[heads].to_numpy(), names, title)
    figure.update_xaxes(title="MHSA head")
    figure.update_yaxes(title="family")
    figure.update_traces(showscale=False)
    figure.update_layout(title={"xref": "container", "x": 0.02}, height=180 + 26 * len(names), margin={"t": 90})
    return figure


# ---- automated interpretability


def score_intervals(data: pd.DataFrame, title: str = "P6: detection scores", chance: float = 0.5) -> go.Figure:
    """Means with intervals over layers, one colour a dictionary, one panel a score; a dashed line at chance.

    Args:
        data: of `autointerp.summary`: `dictionary`, `layer`, `score`, `mean`, `low`, `high`.
        title: of the figure.
        chance: where the dashed line is; correlations have theirs at 0.
    """
    scores = list(dict.fromkeys(data["score"]))
    alike = "simulation" not in scores
    figure = make_subplots(
        rows=1, cols=len(scores), subplot_titles=scores, horizontal_spacing=0.04 if alike else 0.08, shared_yaxes=alike
    )
    layers = sorted(set(data["layer"]))
    for panel, score in enumerate(scores, start=1):
        place = {"row": 1, "col": panel}
        for number, (name, part) in enumerate(data[data["score"] == score].groupby("dictionary", sort=False)):
            error = {"array": part["high"] - part["mean"], "arrayminus": part["mean"] - part["low"], "symmetric": False}
            x = [layers.index(layer) + 0.14 * number for layer in part["layer"]]
            # Dictionaries are moved apart, so that intervals do not hide each other.
            figure.add_scatter(
                **{"x": x, "y": part["mean"], "error_y": error, "name": str(name), "legendgroup": str(name)},
                **{"showlegend": panel == 1, "mode": "markers", "marker": series_style(number)["marker"], **place},
            )
        figure.add_hline(
            y=0 if score == "simulation" else chance, line={"dash": "dash", "color": "#888888", "width": 1}, **place
        )
    ticks = {"tickvals": [i + 0.07 for i in range(len(layers))], "ticktext": [str(layer) for layer in layers]}
    figure.update_xaxes(title="layer", range=[-0.4, len(layers) - 0.4], **ticks)
    if alike:
        figure.update_yaxes(
            range=[min(chance - 0.1, data["low"].min() - 0.02), max(chance + 0.1, data["high"].max() + 0.04)]
        )
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=420, margin={"t": 110})
    figure.update_layout(legend={"orientation": "h", "y": 1.22, "x": 1.0, "xanchor": "right"})
    return figure


def score_against(
    data: pd.DataFrame, x: str, y: str, *, title: str, x_title: str, y_title: str, log: bool = True
) -> go.Figure:
    """One point a unit, one colour a dictionary.

    Args:
        data: of `autointerp.study`.
        x: column of the horizontal axis.
        y: column of the vertical axis, a score with chance at 0.5.
        title: of the figure.
        x_title: with its unit.
        y_title: with its unit.
        log: whether the horizontal axis is logarithmic.
    """
    figure = new_figure(title, x_title, y_title)
    for number, (name, part) in enumerate(data.groupby("dictionary", sort=False)):
        marker = series_style(number)["marker"] | {"size": 5, "opacity": 0.5}
        figure.add_scatter(x=part[x], y=part[y], name=str(name), mode="markers", marker=marker)
    figure.add_hline(y=0.5, line={"dash": "dash", "color": "#888888", "width": 1})
    if log:
        decades = [base * factor for base in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0) for factor in (1, 3)]
        figure.update_xaxes(type="log", tickvals=decades, ticktext=[f"{value:g}" for value in decades])
    return figure


# ---- ablations and scaling laws


def ablation_changes(data: pd.DataFrame, title: str = "P14: what each change does") -> go.Figure:
    """Changes of FVU against the base in percent, with intervals, one row a level, levels of one factor under each other.

    Args:
        data: columns `factor`, `level`, and `change`, `low`, `high` in percent of the base's FVU.
        title: of the figure.
    """
    figure = new_figure(title, "change of held-out FVU against the base (%)", "what is changed")
    for number, (factor, part) in enumerate(data.groupby("factor", sort=False)):
        error = {
            "array": part["high"] - part["change"],
            "arrayminus": part["change"] - part["low"],
            "symmetric": False,
            "thickness": 1.5,
        }
        rows = [[str(factor)] * len(part), part["level"].astype(str).tolist()]
        figure.add_scatter(
            x=part["change"],
            y=rows,
            error_x=error,
            mode="markers",
            marker=series_style(number)["marker"],
            showlegend=False,
        )
    figure.add_vline(x=0, line={"color": "#444444"})
    figure.update_yaxes(autorange="reversed", type="multicategory", dividercolor="#BBBBBB", tickfont={"size": 12})
    figure.update_layout(height=150 + 26 * len(data), title={"xref": "container", "x": 0.02})
    return figure


def start_fvu(data: pd.DataFrame, title: str = "P14: where training starts") -> go.Figure:
    """Held-out FVU with intervals, one row a start.

    Args:
        data: columns `start`, `fvu`, `low`, `high`.
        title: of the figure.
    """
    figure = new_figure(title, "FVU (held-out text)", "taken from the MHSA")
    error = {"array": data["high"] - data["fvu"], "arrayminus": data["fvu"] - data["low"], "symmetric": False}
    figure.add_scatter(
        x=data["fvu"], y=data["start"], error_x=error, mode="markers", marker={**series_style(0)["marker"], "size": 10}
    )
    figure.add_vline(x=1, line={"color": "#888888", "dash": "dash"})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(range=[0, max(1.05, 1.05 * float(data["fvu"].max()))])
    figure.update_layout(height=150 + 36 * len(data), title={"xref": "container", "x": 0.02})
    return figure


def qk_spectra(spectra: Mapping[str, Any], title: str = "P15: singular values of QK circuits") -> go.Figure:
    """Singular values of QK circuits over their rank, each circuit scaled to its own largest: median, middle half and full range.

    Args:
        spectra: kind of circuit to singular values [n_circuits, d_qk], largest first.
        title: of the figure.
    """
    names = list(spectra)
    figure = make_subplots(cols=len(names), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=names)
    for column, name in enumerate(names, 1):
        values = np.asarray(spectra[name], dtype=float)
        scaled = values / values[:, :1]
        ranks, colour = np.arange(1, values.shape[1] + 1), PALETTE[(column - 1) % len(PALETTE)]
        for low, high, opacity, label in ((0.0, 1.0, 0.18, "all circuits"), (0.25, 0.75, 0.4, "middle half")):
            bounds = np.quantile(scaled, [low, high], axis=0)
            band = {
                "fill": "toself",
                "line": {"width": 0},
                "fillcolor": colour,
                "opacity": opacity,
                "hoverinfo": "skip",
            }
            x, y = np.concatenate((ranks, ranks[::-1])), np.concatenate((bounds[1], bounds[0][::-1]))
            figure.add_scatter(x=x, y=y, name=label, mode="lines", showlegend=False, **band, row=1, col=column)
        median = np.quantile(scaled, 0.5, axis=0)
        figure.add_scatter(
            x=ranks,
            y=median,
            name=f"{name}, median",
            line={"color": colour, "width": 2},
            showlegend=False,
            row=1,
            col=column,
        )
    figure.update_yaxes(type="log", tickvals=[1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
    figure.update_yaxes(title="singular value / largest", col=1)
    figure.update_xaxes(title="number")
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "y": 0.96, "yanchor": "top"}, margin={"t": 110}, height=HEIGHT + 20
    )
    return figure


def scaling_laws(
    points: pd.DataFrame,
    laws: Mapping[str, Any],
    *,
    title: str = "P3: FVU against parameters",
    x_title: str = "parameters",
) -> go.Figure:
    """Measured points, fitted laws with their bands, and held-out points beside what was predicted for them.

    Args:
        points: columns `x`, `fvu`, `line` (key of `laws`), `panel`, and `held_out`.
        laws: line to `scaling.PowerLaw`.
        title: of the figure.
        x_title: with its unit.
    """
    panels = list(dict.fromkeys(points["panel"]))
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[str(panel) for panel in panels]
    )
    names = list(dict.fromkeys(points["line"]))
    for number, name in enumerate(names):
        part = points[points["line"] == name]
        column, style = panels.index(part["panel"].iloc[0]) + 1, series_style(number)
        place = {"row": 1, "col": column, "legendgroup": str(name)}
        grid = np.geomspace(points["x"].min(), points["x"].max(), 40)
        low, high = laws[name].band(grid)
        x, y = np.concatenate((grid, grid[::-1])), np.concatenate((high, low[::-1]))
        band = {
            "fill": "toself",
            "fillcolor": style["line"]["color"],
            "opacity": 0.2,
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
        figure.add_scatter(x=x, y=y, mode="lines", showlegend=False, **band, **place)
        figure.add_scatter(x=grid, y=laws[name](grid), mode="lines", line=style["line"], showlegend=False, **place)
        for held_out, fill in ((False, style["line"]["color"]), (True, "white")):
            some = part[part["held_out"] == held_out]
            marker = style["marker"] | {"color": fill, "line": {"color": style["line"]["color"], "width": 2}}
            figure.add_scatter(
                x=some["x"],
                y=some["fvu"],
                mode="markers",
                name=str(name),
                marker=marker,
                showlegend=not held_out,
                **place,
            )
    ticks = sorted(set(points["x"]))
    shown = [tick for number, tick in enumerate(ticks) if number == len(ticks) - 1 or number % 2 == 0]
    figure.update_xaxes(
        title=x_title, type="log", tickvals=shown, ticktext=[_short(tick) for tick in shown], tickangle=0
    )
    figure.update_yaxes(
        type="log", tickvals=[*(value / 100 for value in range(10, 50, 5)), 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    figure.update_yaxes(title="FVU (held-out text)", col=1)
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "y": 0.96, "yanchor": "top", "xref": "container", "x": 0.02}
    )
    figure.update_layout(
        height=HEIGHT + 100, margin={"t": 90, "b": 130}, legend={"orientation": "h", "y": -0.24, "x": 0}
    )
    return figure


def _short(number: float) -> str:
    """A large number in a few characters."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k" if number >= 1e3 else f"{number:g}"
