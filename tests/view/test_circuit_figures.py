"""Figures of circuits hold the numbers that they were given."""

from __future__ import annotations

import math

import pandas as pd
import torch
from test_graph import random_graph

from lorsa_utils.view import figures


def curves() -> pd.DataFrame:
    base = {"parameters": 10.0, "low": 0.1, "high": 0.9, "completeness_low": math.nan, "completeness_high": math.nan}
    rows = [
        {"nodes": name, "size": size, "faithfulness": 0.5, "completeness": math.nan, **base}
        for name in ("a", "random b")
        for size in (1, 4)
    ]
    return pd.DataFrame(rows)


def test_curves_are_lines_with_bands() -> None:
    figure = figures.circuit_curves(curves())
    named = [trace for trace in figure.data if trace.name]
    assert [trace.name for trace in named] == ["a", "random b"]
    assert list(named[0].x) == [1, 4]
    assert named[1].line.dash == "dot"
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert list(bands[0].y) == [0.9, 0.9, 0.1, 0.1]
    assert not [trace for trace in figures.circuit_curves(curves(), y="completeness").data if trace.name], (
        "nothing was measured"
    )


def test_graph_shows_every_node_and_names_errors() -> None:
    graph = random_graph(6, 0)
    figure = figures.attribution_graph(graph)
    markers = {trace.name: len(trace.x) for trace in figure.data if trace.mode == "markers"}
    assert markers == {"embedding": 3, "unit": 5, "error": 1, "logit": 1}
    assert len([trace for trace in figure.data if trace.mode == "lines"]) == len(graph.links)
    assert "error" in next(trace for trace in figure.data if trace.name == "error").text[0]


def test_pair_map_keeps_the_sum() -> None:
    pairs = torch.randn(20, 15, generator=torch.Generator().manual_seed(0))
    figure = figures.pair_map(pairs, [f"q{i}" for i in range(20)], [f"k{i}" for i in range(15)], n=4)
    assert abs(figure.data[0].z.sum() - float(pairs.sum())) < 1e-4
    assert figure.data[0].z.shape == (5, 5)
    assert figure.data[0].x[-1] == "all others"


def test_scatter_and_weights() -> None:
    data = pd.DataFrame(
        {"exact": [1.0, 2.0], "estimated": [1.5, 2.5], "estimate": ["gradient", "integrated"], "node": ["1.2", "1.3"]}
    )
    figure = figures.effect_scatter(data)
    assert [trace.name for trace in figure.data] == ["gradient", "integrated", "equal"]
    labels = {"title": "t", "x_title": "x", "y_title": "y"}
    figure = figures.weight_map([[1.0, -3.0]], ["a"], ["b", "c"], **labels)
    assert figure.data[0].zmin == -3
