"""The notebooks that build on each other, in order, in the smoke profile, as a reader of `make reproduce` gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
import smoke_run
from browsing import Watched, keep_screenshot, open_browser
from jupyter_lab import explore, open_lab, run_all

from lorsa_utils.kit import reproduce

NOTEBOOKS = [name for name in smoke_run.names() if name not in smoke_run.names(smoke_run.INDEPENDENT)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke_run.folder(tmp_path_factory)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_meets_its_expected_values(name: str, run_dir: Path) -> None:
    if name == NOTEBOOKS[-1]:  # it shows what all others found
        for other in smoke_run.names(smoke_run.INDEPENDENT):
            smoke_run.run(other, run_dir)
    smoke_run.check(name, run_dir)


@pytest.mark.browser
def test_notebook_06_can_be_used_in_jupyterlab(run_dir: Path, tmp_path: Path) -> None:
    """With what 02 and 03 trained in this run."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed; pip install 'lorsa-utils[notebooks]'")
    book = nbformat.read(reproduce.notebooks_dir() / "06_head_explorer.ipynb", as_version=4)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f'PROFILE = "smoke"\nRUN_DIR = {str(run_dir)!r}\nSEED = 0'
    nbformat.write(book, tmp_path / "06_head_explorer.ipynb")
    with open_browser() as browser, open_lab(tmp_path) as address:
        tab: Watched = run_all(browser, address, "06_head_explorer.ipynb", 25)
        page: Any = tab.page
        assert page.locator(".jp-RenderedPlotly, .js-plotly-plot, .jp-RenderedImage img").count() >= 4, (
            "pictures beside the widgets"
        )
        explore(page)
        keep_screenshot(page, "notebook_06")
        assert not [problem for problem in tab.problems if "Error" in problem]
