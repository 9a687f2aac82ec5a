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
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lorsa_utils import store
from lorsa_utils.exceptions import UserError

if TYPE_CHECKING:
    from lorsa_utils.circuits.graph import Graph
    from lorsa_utils.view.evidence import Context

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


# ---- drawings


def lines(
    data: pd.DataFrame, x: str, y: str, by: str | None = None, *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Lines with markers, one for each value of column `by`; colour and symbol both tell them apart.

    Args:
        data: one row a point.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        by: column that separates the lines; one line without it.
        title: of the figure.
        x_title: with its unit.
        y_title: with its unit.
    """
    figure = new_figure(title, x_title, y_title)
    groups: list[tuple[str, pd.DataFrame]] = (
        [("", data)] if by is None else [(str(k), part) for k, part in data.groupby(by, sort=False)]
    )
    for number, (name, part) in enumerate(groups):
        style = _style(number)
        figure.add_scatter(x=part[x], y=part[y], name=name, mode="lines+markers", showlegend=by is not None, **style)
    return figure


def bars(
    data: pd.DataFrame, x: str, y: str, by: str | None = None, *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """Grouped bars over the categories in column `x`, one colour for each value of column `by`; arguments as in `lines`."""
    figure = new_figure(title, x_title, y_title)
    groups: list[tuple[str, pd.DataFrame]] = (
        [("", data)] if by is None else [(str(k), part) for k, part in data.groupby(by, sort=False)]
    )
    for number, (name, part) in enumerate(groups):
        colour = PALETTE[number % len(PALETTE)]
        figure.add_bar(x=part[x].astype(str), y=part[y], name=name, marker_color=colour, showlegend=by is not None)
    figure.update_layout(barmode="group", xaxis_type="category")
    return figure


def _style(number: int) -> dict[str, Any]:
    return {
        "line": {"color": PALETTE[number % len(PALETTE)], "width": 2},
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8, "color": PALETTE[number % len(PALETTE)]},
    }


def training_curves(logs: Mapping[str, Sequence[Mapping[str, float]]], title: str = "Training") -> go.Figure:
    """FVU (above) and dead fraction (below) against training tokens.

    Args:
        logs: run name to the rows of its metrics.jsonl (`train.read_log`).
        title: of the figure.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for number, (name, rows) in enumerate(logs.items()):
        tokens = [row["tokens"] for row in rows]
        for panel, key in ((1, "fvu"), (2, "dead_fraction")):
            figure.add_scatter(
                x=tokens,
                y=[row[key] for row in rows],
                name=name,
                legendgroup=name,
                showlegend=panel == 1,
                mode="lines",
                line=_style(number)["line"],
                row=panel,
                col=1,
            )
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=520)
    figure.update_yaxes(title="FVU (training batch)", type="log", row=1, col=1)
    figure.update_yaxes(title="dead heads (share)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title="training tokens", row=2, col=1)
    return figure


def layer_fvu(data: pd.DataFrame, title: str = "P4: reconstruction of attention layers") -> go.Figure:
    """Held-out FVU over layers, one line for each kind of module.

    Args:
        data: columns `layer`, `module` (name in the legend) and `fvu`.
        title: of the figure.
    """
    figure = lines(data, "layer", "fvu", "module", title=title, x_title="layer", y_title="FVU (held-out)")
    # As names, not as numbers: the labels of neighbouring layers would cover each other.
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=sorted(set(data["layer"])))
    figure.update_yaxes(rangemode="tozero")
    return figure


def scatter_fvu(data: pd.DataFrame, title: str = "P4: FVU of Lorsa against the SAE") -> go.Figure:
    """One point a layer, Lorsa's FVU against the SAE's, with Pearson's correlation (from three layers on) and the diagonal.

    Args:
        data: columns `layer`, `lorsa` and `sae`.
        title: of the figure.
    """
    figure = new_figure(title, "FVU of the SAE (held-out)", "FVU of Lorsa (held-out)")
    end = 1.05 * float(data[["lorsa", "sae"]].to_numpy().max())
    figure.add_scatter(x=[0, end], y=[0, end], mode="lines", line={"color": "#999999", "dash": "dash"}, name="equal")
    data = data.sort_values("sae")
    labels = [f"layer {layer}" for layer in data["layer"]]
    sides = [
        ("top center", "bottom center")[number % 2] for number in range(len(data))
    ]  # neighbours would cover each other
    marker = {"size": 10, "color": PALETTE[0]}
    figure.add_scatter(
        x=data["sae"],
        y=data["lorsa"],
        text=labels,
        mode="markers+text",
        textposition=sides,
        marker=marker,
        name="layers",
    )
    if len(data) >= 3:
        correlation = float(np.corrcoef(data["sae"], data["lorsa"])[0, 1])
        note = f"r = {correlation:.2f} over {len(data)} layers"
        figure.add_annotation(
            x=0.02, y=0.98, xref="paper", yref="paper", xanchor="left", yanchor="top", showarrow=False, text=note
        )
    figure.update_layout(showlegend=False)
    return figure


def loss_recovered(data: pd.DataFrame, title: str = "Loss of the model with the layer replaced") -> go.Figure:
    """Share of the loss recovered when a module takes the layer's place: 0 is the mean output, 1 the layer itself.

    Args:
        data: columns `layer`, `module` and `ce_recovered`.
        title: of the figure.
    """
    figure = bars(
        data, "layer", "ce_recovered", "module", title=title, x_title="layer", y_title="loss recovered (share)"
    )
    figure.add_hline(y=1, line={"color": "#444444", "dash": "dot"})
    return figure


def sink_bars(attention: Sequence[float], title: str = "P8: attention to the first token") -> go.Figure:
    """Mean attention that each head pays to the first token.

    Args:
        attention: one share for each head.
        title: of the figure.
    """
    data = pd.DataFrame({"head": range(len(attention)), "attention": np.asarray(attention, dtype=float)})
    figure = bars(
        data, "head", "attention", title=title, x_title="head", y_title="attention to the first token (share)"
    )
    figure.update_yaxes(range=[0, 1])
    return figure


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


# ---- the kernels of notebook 12


def attention_tiles(data: pd.DataFrame, title: str = "T2: tiles of the attention kernels") -> go.Figure:
    """Rectangles of queries (down) by keys (across) that kernels compute, one panel a kernel; what stays white is never computed.

    Args:
        data: one row a tile, columns `kernel`, `query`, `query_end`, `key`, `key_end` and `used`, the share of entries
            that count.
        title: of the figure.
    """
    kernels = list(dict.fromkeys(data["kernel"]))
    figure = make_subplots(cols=len(kernels), shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=kernels)
    kinds = {"all entries used": (data["used"] == 1, PALETTE[0]), "some entries masked": (data["used"] < 1, PALETTE[5])}
    for column, kernel in enumerate(kernels, 1):
        for name, (chosen, colour) in kinds.items():
            xs: list[Any] = []
            ys: list[Any] = []
            for tile in data[chosen & (data["kernel"] == kernel)].itertuples():
                xs += [tile.key, tile.key_end, tile.key_end, tile.key, tile.key, None]
                ys += [tile.query, tile.query, tile.query_end, tile.query_end, tile.query, None]
            figure.add_scatter(
                x=xs,
                y=ys,
                name=name,
                mode="lines",
                fill="toself",
                fillcolor=colour,
                line={"color": "white", "width": 1},
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    ends = float(data["key_end"].max()), float(data["query_end"].max())
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "y": 0.97, "yanchor": "top"}, height=400, margin={"t": 80, "b": 100}
    )
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.3})
    figure.update_xaxes(range=[0, ends[0]], tickvals=[0, ends[0] / 2, ends[0]], title="key", showgrid=False)
    figure.update_yaxes(range=[ends[1], 0], showgrid=False)
    figure.update_yaxes(title="query", col=1)
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


# ---- circuits


def circuit_curves(
    data: pd.DataFrame, x: str = "size", y: str = "faithfulness", *, title: str = "P17: faithfulness"
) -> go.Figure:
    """Faithfulness or completeness against circuit size, one line a kind with its interval as a band; size on a logarithmic axis.

    Args:
        data: of `faithfulness.curve_table`.
        x: `size` (nodes) or `parameters` (weights).
        y: `faithfulness` or `completeness`.
        title: of the figure.
    """
    x_title = {"size": "nodes in the circuit", "parameters": "weights that its nodes are computed with"}[x]
    figure = new_figure(title, x_title, f"{y} (share of the behaviour)")
    ends = ("low", "high") if y == "faithfulness" else (f"{y}_low", f"{y}_high")
    for number, (name, part) in enumerate(data[data[y].notna()].groupby("nodes", sort=False)):
        style = _style(number)
        band = pd.concat(
            [
                part[[x, ends[1]]].set_axis(["x", "y"], axis=1),
                part[[x, ends[0]]].iloc[::-1].set_axis(["x", "y"], axis=1),
            ]
        )
        colour = PALETTE[number % len(PALETTE)]
        figure.add_scatter(
            x=band["x"],
            y=band["y"],
            fill="toself",
            fillcolor=_faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            mode="lines",
        )
        dash = "dot" if "random" in str(name) else "solid"
        figure.add_scatter(x=part[x], y=part[y], name=str(name), **style)
        figure.data[-1].line.dash = dash
    # A share of little has wide intervals; they may leave the picture, the lines may not hide in it.
    low, high = (
        float(getattr(data[[y, end]], side)().agg(side)) for end, side in zip(ends, ("min", "max"), strict=True)
    )
    figure.update_yaxes(range=[max(min(low, -0.1), -0.6), min(max(high, 1.1), 1.6)])
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": "#888888", "dash": "dot", "width": 1})
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0}, height=HEIGHT + 60)
    return figure


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def effect_scatter(data: pd.DataFrame, title: str = "P17: estimated against exact effects") -> go.Figure:
    """Exact effects of nodes against estimated ones.

    Args:
        data: columns `exact`, `estimated`, `estimate` (how it was estimated) and `node`.
        title: of the figure.
    """
    figure = new_figure(title, "estimated effect (fall of the logit difference)", "exact effect")
    for number, (name, part) in enumerate(data.groupby("estimate", sort=False)):
        marker = {"size": 8, "symbol": SYMBOLS[number], "color": PALETTE[number], "opacity": 0.7}
        figure.add_scatter(
            x=part["estimated"], y=part["exact"], mode="markers", name=str(name), marker=marker, text=part["node"]
        )
    ends = [float(data[["exact", "estimated"]].min().min()), float(data[["exact", "estimated"]].max().max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": "#888888", "dash": "dash"}, name="equal", hoverinfo="skip"
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0}, height=HEIGHT + 40)
    return figure


_NODE_STYLES = {
    "embedding": ("square", "#888888"),
    "unit": ("circle", PALETTE[0]),
    "error": ("diamond", PALETTE[1]),
    "logit": ("square", PALETTE[2]),
}


def attribution_graph(graph: Graph, title: str = "P17: attribution graph", n_labels: int = 12) -> go.Figure:
    """A graph as read from its file: tokens across, layers up, errors as diamonds; edges as wide as their share of their target's largest.

    Args:
        graph: of `graph.read_graph`.
        title: of the figure.
        n_labels: places (a token and a layer) whose most influential unit is named.
    """
    layers = sorted({node.layer for node in graph.nodes})
    height = {layer: number for number, layer in enumerate(layers)}
    place = _node_places(graph, height)
    figure = new_figure(title, "token", "layer")
    largest: dict[str, float] = {}
    for _, target, weight in graph.links:
        largest[target] = max(largest.get(target, 0.0), abs(weight))
    for source, target, weight in sorted(graph.links, key=lambda link: abs(link[2]) / (largest[link[1]] or 1.0))[-300:]:
        (x0, y0), (x1, y1) = place[source], place[target]
        share = abs(weight) / (largest[target] or 1.0)
        line = {
            "width": 0.3 + 2 * share,
            "color": _faint(PALETTE[0] if weight > 0 else PALETTE[1]).replace("0.15", f"{0.1 + 0.4 * share:.2f}"),
        }
        figure.add_scatter(x=[x0, x1], y=[y0, y1], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for kind, (symbol, colour) in _NODE_STYLES.items():
        nodes = [node for node in graph.nodes if node.kind == kind]
        texts = [
            f"{node.label}<br>influence {node.influence or 0:.3f}, activation {node.activation or 0:.2f}"
            for node in nodes
        ]
        xs, ys = [place[node.node_id][0] for node in nodes], [place[node.node_id][1] for node in nodes]
        marker = {
            "symbol": symbol,
            "color": colour,
            "size": [7 + 14 * min(1.0, node.influence or 0) ** 0.5 for node in nodes],
        }
        figure.add_scatter(x=xs, y=ys, mode="markers", name=kind, marker=marker, text=texts, hoverinfo="text")
    # One name for each token and layer, its most influential unit's: more would lie over each other. The rest show
    # theirs on hover.
    named: dict[tuple[int, int], Any] = {}
    for node in sorted((node for node in graph.nodes if node.kind == "unit"), key=lambda node: -(node.influence or 0)):
        named.setdefault((node.position, node.layer), node)
    for node in list(named.values())[:n_labels]:
        x, y = place[node.node_id]
        figure.add_annotation(x=x, y=y, text=f"{node.layer}.{node.unit}", showarrow=False, yshift=13, font={"size": 9})
    figure.update_xaxes(
        tickvals=list(range(len(graph.tokens))), ticktext=list(graph.tokens), tickangle=-60, showgrid=False
    )
    names = ["tokens" if layer < 0 else "logit" if layer >= graph.n_layers else str(layer) for layer in layers]
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=names)
    figure.update_layout(height=560, width=WIDTH + 120, legend={"orientation": "h", "y": 1.08, "x": 0.35})
    return figure


def _node_places(graph: Graph, height: Mapping[int, int]) -> dict[str, tuple[float, float]]:
    """Nodes of one token and layer side by side, the most influential in the middle."""
    cells: dict[tuple[int, int], list[Any]] = {}
    for node in sorted(graph.nodes, key=lambda node: -(node.influence or 0)):
        cells.setdefault((node.position, height[node.layer]), []).append(node)
    place = {}
    for (position, level), nodes in cells.items():
        for number, node in enumerate(nodes):
            ring = (number + 1) // 2 * (1 if number % 2 else -1)
            spread = 0.85 / max(3, len(nodes))
            place[node.node_id] = (
                position + ring * spread,
                level + (0.14 if number % 3 == 1 else -0.14 if number % 3 == 2 else 0.0),
            )
    return place


def pair_map(
    pairs: Any, queries: Sequence[str], keys: Sequence[str], n: int = 10, title: str = "P17: why a head looks there"
) -> go.Figure:
    """Score contributions of pairs of parts: the largest rows and columns, and the rest of each side summed.

    Args:
        pairs: [n_queries, n_keys], they sum to the score.
        queries: names of the query side's parts.
        keys: names of the key side's parts.
        n: parts shown of each side.
        title: of the figure.
    """
    values = np.asarray(pairs, dtype=float)
    shown = []
    for axis, names in ((0, list(queries)), (1, list(keys))):
        order = np.argsort(-np.abs(values).sum(axis=1 - axis))
        kept = order[:n]
        rest = np.delete(values, kept, axis=axis).sum(axis=axis, keepdims=True)
        values = np.concatenate([np.take(values, kept, axis=axis), rest], axis=axis)
        shown.append([names[i] for i in kept] + ["all others"])
    largest = float(np.abs(values).max()) or 1.0
    figure = new_figure(title, "key side", "query side")
    figure.add_heatmap(
        z=values, x=shown[1], y=shown[0], zmin=-largest, zmax=largest, colorscale="RdBu_r", colorbar={"title": "score"}
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category", tickangle=-45)
    figure.update_layout(height=480)
    return figure


def weight_map(
    values: Any, rows: Sequence[str], columns: Sequence[str], *, title: str, x_title: str, y_title: str
) -> go.Figure:
    """A matrix of weights with zero in white: [n_rows, n_columns]."""
    matrix = np.asarray(values, dtype=float)
    largest = float(np.abs(matrix).max()) or 1.0
    figure = new_figure(title, x_title, y_title)
    figure.add_heatmap(z=matrix, x=list(columns), y=list(rows), zmin=-largest, zmax=largest, colorscale="RdBu_r")
    figure.update_xaxes(type="category")
    figure.update_yaxes(autorange="reversed", type="category")
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
                **{"showlegend": panel == 1, "mode": "markers", "marker": _style(number)["marker"], **place},
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
        marker = _style(number)["marker"] | {"size": 5, "opacity": 0.5}
        figure.add_scatter(x=part[x], y=part[y], name=str(name), mode="markers", marker=marker)
    figure.add_hline(y=0.5, line={"dash": "dash", "color": "#888888", "width": 1})
    if log:
        decades = [base * factor for base in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0) for factor in (1, 3)]
        figure.update_xaxes(type="log", tickvals=decades, ticktext=[f"{value:g}" for value in decades])
    return figure


# ---- looking at heads


def head_context(context: Context, title: str = "P5: one context of a head", n: int = 44) -> go.Figure:
    """A context as a head page shows it: activation of each token, and z pattern and attention of the token it was chosen for.

    Args:
        context: of `evidence.read_context`.
        title: of the figure.
        n: tokens to draw: the last ones up to the chosen one, with its main sources where these are further back.
    """
    peak = context.n_before + context.peak
    shown = sorted({*range(max(0, peak - n), peak + 1), *context.main_sources})
    names = [f"{column} {context.tokens[column] or 'added up'}" for column in shown]
    activation = [0.0] * context.n_before + context.activation.tolist()
    z, attention = context.z_pattern[context.peak].tolist(), context.attention[context.peak].tolist()
    panels = (("activation", activation, PALETTE[4]), ("z pattern", z, PALETTE[0]), ("attention", attention, "#767676"))
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.04)
    for row, (name, values, colour) in enumerate(panels, 1):
        drawn = [values[column] for column in shown]
        colours = [PALETTE[3] if value < 0 else colour for value in drawn]
        figure.add_bar(x=names, y=drawn, name=name, marker_color=colours, showlegend=False, row=row, col=1)
        figure.update_yaxes(title=name, row=row, col=1)
    figure.update_xaxes(type="category", showgrid=False, tickangle=90, tickfont={"size": 10})
    figure.update_xaxes(title=f"source tokens, up to “{context.tokens[peak].strip() or 'white space'}”", row=3, col=1)
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=620)
    return figure


def next_tokens(data: pd.DataFrame, title: str = "P5: next-token probabilities before and after") -> go.Figure:
    """Bars of `dashboard.steer`: columns `token`, `before` and `after`."""
    long = data.melt("token", ["before", "after"], var_name="when", value_name="probability")
    long["token"] = [repr(token) for token in long["token"]]
    return bars(long, "token", "probability", "when", title=title, x_title="next token", y_title="probability")


def head_list(data: pd.DataFrame, title: str = "P5: heads of the layer", n: int = 12) -> go.Figure:
    """The first rows of a table of heads, as a picture."""
    rows = data.head(n)
    percents = {
        "active (%)": "frequency",
        "first token (%)": "first_share",
        "token before (%)": "previous_share",
        "itself (%)": "self_share",
    }
    columns = {"head": rows["head"].astype(str), "family": rows["family"].replace("", "–")}
    columns |= {name: (100 * rows[key]).map("{:.1f}".format) for name, key in percents.items()}
    columns["tokens back"] = rows["distance"].map("{:.0f}".format)
    return toy_table(pd.DataFrame(columns), title, [1, 2, 1, 1, 1, 1, 1])


# ---- error analysis


def intervals(
    data: pd.DataFrame,
    x: str,
    by: str,
    *,
    title: str,
    x_title: str,
    y_title: str,
    value: str = "value",
    line: float | None = 0.0,
) -> go.Figure:
    """Values with intervals over categories; colour and symbol tell the values of column `by` apart.

    Args:
        data: one row a point, with columns `low` and `high` beside `value`.
        x: column of the categories.
        by: column that separates the points of one category.
        title: of the figure.
        x_title: of the categories.
        y_title: with its unit.
        value: column of the values.
        line: where a dashed line is drawn, if anywhere.
    """
    figure = new_figure(title, x_title, y_title)
    names, groups = list(dict.fromkeys(data[x].astype(str))), list(data.groupby(by, sort=False))
    step = min(0.16, 0.7 / len(groups))
    for number, (name, part) in enumerate(groups):
        # Points of one category stand side by side, so that intervals do not hide each other.
        places = [names.index(str(category)) + step * (number - (len(groups) - 1) / 2) for category in part[x]]
        error = {"array": part["high"] - part[value], "arrayminus": part[value] - part["low"], "symmetric": False}
        figure.add_scatter(
            x=places, y=part[value], error_y=error, name=str(name), mode="markers", marker=_style(number)["marker"]
        )
    if line is not None:
        figure.add_hline(y=line, line={"dash": "dash", "color": "#888888", "width": 1})
    shown = ["<br>".join(textwrap.wrap(name, 66 // len(names), break_long_words=False)) for name in names]
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=shown, range=[-0.5, len(names) - 0.5], title_standoff=12
    )
    rows = (len(groups) + 1) // 2
    figure.update_layout(height=HEIGHT + 20 * rows, margin={"t": 70 + 20 * rows}, title={"y": 0.96, "yanchor": "top"})
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "entrywidth": 190})
    return figure
