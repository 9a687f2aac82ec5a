"""All notebooks in order, in the smoke profile and one run folder, as a reader of `make reproduce` gets them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lorsa_utils import notebook, reproduce

NOTEBOOKS = [path.stem for path in sorted(reproduce.notebooks_dir().glob("[0-9]*_*.ipynb"))]
# These need no artefact of an earlier notebook.
SELF_CONTAINED = [name for name in NOTEBOOKS if name.startswith(("00_", "12_"))]

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
    assert all(check.passed is not False for check in notebook.check_values(recorded, expected))
    assert name in (run_dir / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_self_contained_notebook_runs_straight_from_its_file(name: str, tmp_path: Path) -> None:
    # Its parameters are those of a reader; only the run folder must not be theirs.
    source = reproduce.notebooks_dir() / f"{name}.ipynb"
    link = tmp_path / "data"
    link.mkdir()
    for part in ("expected", "corpus", "models", "cache", "benchmarks.csv"):
        if (place := Path(__file__).resolve().parents[2] / "data" / part).exists():
            (link / part).symlink_to(place)
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=900", "-p", "no:cacheprovider", "-q", str(source)]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"LORSA_DATA": str(link), "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
