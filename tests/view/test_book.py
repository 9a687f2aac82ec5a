"""The book of a run: what it shows, what it misses, what training cost."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest

from lorsa_utils import store
from lorsa_utils.config import PROFILES
from lorsa_utils.kit import claims, notebook, reproduce
from lorsa_utils.view import book, figures


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> notebook.Context:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(figures, "can_draw_png", lambda: False)
    made = notebook.start("03_reconstruction", "smoke", tmp_path / "run")
    made.show(
        go.Figure(go.Scatter(x=[1, 2], y=[3, 4])),
        "P4_layer_fvu",
        "FVU.",
        pd.DataFrame({"fvu": [0.25]}),
        layer=[1, 2],
        tokens=20_000,
    )
    return made


def shown_labels() -> dict[str, str]:
    """Labels that notebooks write out in full, and the notebook of each."""
    found = {}
    for path in reproduce.find_notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                for node in ast.walk(ast.parse(cell.source)):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.show" and len(node.args) > 1:
                        label = node.args[1]
                        if isinstance(label, ast.Constant):
                            found[str(label.value)] = path.stem
    return found


def test_every_figure_of_a_notebook_is_expected_somewhere() -> None:
    expected: dict[str, str] = {}
    for name in PROFILES:
        expected |= book.expected_figures(name)
    shown = shown_labels()
    assert len(shown) > 40
    assert {label: expected.get(label) for label in shown} == shown, (
        "data/paper/figures.csv lists every figure and its notebook"
    )
    assert set(expected.values()) <= {path.stem for path in reproduce.find_notebooks()}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_whole_run_shows_every_item(profile: str) -> None:
    items = {label.split("_")[0] for label in book.expected_figures(profile)}
    assert items == set(claims.ITEMS)


def test_missing_figures_are_named_with_their_notebook(run: notebook.Context) -> None:
    missing = book.missing_figures(run.folder, "smoke")
    assert "P4_layer_fvu" not in missing
    assert missing["P16_loss"] == "11_error_analysis"
    (run.folder / "figures" / "P4_layer_fvu.html").unlink()
    assert book.missing_figures(run.folder, "smoke")["P4_layer_fvu"] == "03_reconstruction"


def test_figures_are_shown_with_the_run_that_made_them(run: notebook.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    book.show(run.folder, "P4")
    caption, numbers, line = shown
    assert caption.data == "**P4_layer_fvu**. FVU."
    assert numbers["fvu"].tolist() == [0.25], "without an image the numbers are shown"
    for part in (
        "notebook 03_reconstruction",
        "profile smoke",
        "model smollm2",
        "layer 1 2",
        "tokens 20,000",
        "seed 0",
        "torch 2",
        "device",
    ):
        assert part in line.data
    (run.folder / "figures" / "P4_layer_fvu.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    book.show(run.folder, "P4")
    assert shown[4].data.startswith(b"\x89PNG")
    book.show(run.folder, "P5")
    assert "no figure of P5" in shown[-1].data


def test_device_is_that_of_the_run(run: notebook.Context) -> None:
    assert book.device(run.folder, "03_reconstruction") == notebook.device_name()
    assert book.device(run.folder, "02_train_lorsa") == "unknown"


def test_costs_are_those_of_whole_trainings(run: notebook.Context) -> None:
    assert book.costs(run.folder).empty
    for name, kind, units in (
        ("lorsa-1234", "lorsa", "n_ov_heads"),
        ("layer01_sae-99", "sae", "n_features"),
        ("layer02_sae-98", "sae", "n_features"),
    ):
        folder = run.folder / "runs" / name
        store.write_json(folder / "config.json", {"layer": 1, "module": {"kind": kind, units: 64}})
        store.write_text(folder / "metrics.jsonl", '{"tokens": 10, "seconds": 1}\n{"tokens": 600, "seconds": 120.0}\n')
        if name != "layer02_sae-98":
            (folder / "model.safetensors").write_bytes(b"")
    table = book.costs(run.folder)
    assert list(table["module"]) == ["layer01_sae", "lorsa"]
    assert list(table["minutes"]) == [2, 2]
    assert list(table["tokens_per_s"]) == [5, 5]
    assert list(table["units"]) == [64, 64]
