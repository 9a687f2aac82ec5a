"""The smoke run of all notebooks in one folder, shared by the test files that fill it, each in a worker of its own."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

from lorsa_utils.kit import notebook, reproduce

INDEPENDENT = ("00", "12", "14")
"""Notebooks that need no other one."""


def names(numbers: tuple[str, ...] | None = None) -> list[str]:
    return [path.stem for path in reproduce.find_notebooks(only=numbers)]


def folder(factory: pytest.TempPathFactory) -> Path:
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"
    shared.mkdir(exist_ok=True)
    return shared


def run(name: str, run_dir: Path) -> None:
    """Run a notebook, unless it has run in this folder already."""
    with FileLock(run_dir / f".{name}.lock"):
        (status,) = reproduce.reproduce("smoke", [name], run_dir=run_dir)
    assert status.status in ("done", "up to date"), status.error


def check(name: str, run_dir: Path) -> None:
    run(name, run_dir)
    output = nbformat.read(run_dir / f"{name}.ipynb", as_version=4)
    nbformat.validate(output)
    recorded = notebook.read_results(run_dir)[name]
    assert recorded, "a notebook records what it measured"
    expected = notebook.expected_values(name, "smoke")
    assert expected, f"data/expected/{name}.json has a section for the smoke profile"
    assert all(value.result != "FAIL" for value in notebook.check_values(recorded, expected))
    assert name in (run_dir / "index.html").read_text(encoding="utf-8")
