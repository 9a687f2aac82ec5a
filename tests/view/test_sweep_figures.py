"""Figures of ablations, QK spectra and scaling laws say what the numbers say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorsa_utils.kit import scaling
from lorsa_utils.view import figures

CHANGES = pd.DataFrame(
    {
        "factor": ["G", "G", "start"],
        "level": ["32", "128", "random"],
        "change": [1.0, -2.0, 9.0],
        "low": [0.5, -4.0, 8.0],
        "high": [1.5, 0.0, 11.0],
    }
)


def test_changes_stand_under_their_factor_with_their_intervals() -> None:
    figure = figures.ablation_changes(CHANGES)
    assert [list(trace.y[0]) for trace in figure.data] == [["G", "G"], ["start"]]
    assert [list(trace.y[1]) for trace in figure.data] == [["32", "128"], ["random"]]
    assert list(figure.data[0].error_x.array) == pytest.approx([0.5, 2.0])
    assert list(figure.data[0].error_x.arrayminus) == pytest.approx([0.5, 2.0])
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text


def test_starts_are_in_the_order_of_the_data_with_the_first_on_top() -> None:
    data = pd.DataFrame({"start": ["both", "random"], "fvu": [0.3, 0.9], "low": [0.2, 0.8], "high": [0.4, 1.2]})
    figure = figures.start_fvu(data)
    assert list(figure.data[0].y) == ["both", "random"]
    assert figure.layout.yaxis.autorange == "reversed"
    assert list(figure.data[0].error_x.array) == pytest.approx([0.1, 0.3])


def test_spectra_start_at_one_and_have_a_panel_each() -> None:
    spectra = {"MHSA": [[4.0, 2.0, 1.0], [8.0, 8.0, 2.0]], "Lorsa": [[1.0, 0.1, 0.01]]}
    figure = figures.qk_spectra(spectra)
    medians = [trace for trace in figure.data if "median" in str(trace.name)]
    assert list(medians[0].y) == pytest.approx([1.0, 0.75, 0.25])
    assert list(medians[1].y) == pytest.approx([1.0, 0.1, 0.01])
    assert [note.text for note in figure.layout.annotations] == ["MHSA", "Lorsa"]


def test_laws_show_every_point_and_held_out_ones_open() -> None:
    sizes = np.array([1e6, 2e6, 3e6, 4e6])
    law = scaling.fit(sizes, 0.1 + 0.2 * (sizes / 1e6) ** -0.5, n_draws=20)
    points = pd.DataFrame(
        {
            "x": [*sizes, 8e6],
            "fvu": [*law.values, 0.17],
            "line": "K = 4",
            "panel": "Lorsa",
            "held_out": [False] * 4 + [True],
        }
    )
    figure = figures.scaling_laws(points, {"K = 4": law})
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in marks] == [4, 1]
    assert marks[1].marker.color == "white"
    assert figure.layout.xaxis.ticktext[-1] == "8.0M"
