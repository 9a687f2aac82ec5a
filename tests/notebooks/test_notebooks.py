"""All notebooks in order, in the smoke profile and one run folder, as a reader of `make reproduce` gets them."""

from pathlib import Path

import nbformat
import pytest

from lorsa_utils.kit import notebook, reproduce

NOTEBOOKS = [path.stem for path in reproduce.find_notebooks()]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_meets_its_expected_values(name: str, run_dir: Path) -> None:
    (status,) = reproduce.reproduce("smoke", [name], run_dir=run_dir)
    assert status.status == "done", status.error
    output = nbformat.read(run_dir / f"{name}.ipynb", as_version=4)
    nbformat.validate(output)
    recorded = notebook.read_results(run_dir)[name]
    assert recorded, "a notebook records what it measured"
    expected = notebook.expected_values(name, "smoke")
    assert expected, f"data/expected/{name}.json has a section for the smoke profile"
    assert all(check.result != "FAIL" for check in notebook.check_values(recorded, expected))
    assert name in (run_dir / "index.html").read_text(encoding="utf-8")
