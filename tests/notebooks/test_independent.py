"""Notebooks that need no artefact of an earlier one, in a worker of their own; one of them straight from its file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import smoke_run

from lorsa_utils.kit import reproduce

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", smoke_run.names(smoke_run.INDEPENDENT))
def test_independent_notebook_runs_and_meets_its_expected_values(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    smoke_run.check(name, smoke_run.folder(tmp_path_factory))


@pytest.mark.parametrize("name", smoke_run.names(("12",)))
def test_self_contained_notebook_runs_straight_from_its_file(name: str, tmp_path: Path) -> None:
    # Its parameters are those of a reader; only the run folder must not be theirs.
    source = reproduce.notebooks_dir() / f"{name}.ipynb"
    link = tmp_path / "data"
    link.mkdir()
    for part in ("expected", "corpus", "models", "cache", "benchmarks.csv"):
        if (place := Path(__file__).resolve().parents[2] / "data" / part).exists():
            (link / part).symlink_to(place)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--nbmake-timeout=900",
        "-p",
        "no:cacheprovider",
        "-q",
        str(source),
    ]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "LORSA_DATA": str(link),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
