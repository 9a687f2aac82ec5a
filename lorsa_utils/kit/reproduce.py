"""Run all notebooks in order and write one page with the results.

1. A notebook is skipped while its cells, the modules it imports, the profile and its expected values are those of its
   last good run and its outputs exist. One that shows others' results (`reads_run` in its metadata) comes last and is
   skipped only while these are the same too.
2. papermill executes it with PROFILE and RUN_DIR (and TRAIN where it has that) set, into `NN_name.failed.ipynb`, which
   becomes `NN_name.ipynb` once every cell passed. The run stops at the first failure: later notebooks read earlier
   artefacts.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorsa_utils import store
from lorsa_utils.config import Profile, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import notebook
from lorsa_utils.kit.claims import paper_dir
from lorsa_utils.view.gallery import figure_records, write_index

PACKAGE = store.CHECKOUT / "lorsa_utils"
LOG_FILE = "reproduce.json"
"""Of a run folder: hash, seconds and commit of each notebook's last good run."""
CELL_TIMEOUT_SECONDS = {"smoke": 900, "laptop": 3600}
"""A cell that runs longer fails its notebook; 14 days in larger profiles."""


@dataclass
class NotebookStatus:
    """What happened to one notebook."""

    name: str
    status: str = "not run"
    """`done`, `up to date`, `failed` or `not run`."""
    seconds: float = 0.0
    """Of its last good run, or of the failed one."""
    error: str | None = None


def notebooks_dir() -> Path:
    """The folder of the numbered notebooks."""
    return store.CHECKOUT / "notebooks"


def find_notebooks(only: Sequence[str] | None = None) -> list[Path]:
    """Notebooks `NN_name.ipynb` by number, those that show others' results last.

    `only` keeps those of a number or name, such as `02`.

    Raises:
        UserError: there are none, or one in `only` does not exist.
    """
    paths = [path for path in notebooks_dir().glob("*.ipynb") if re.match(r"\d+_", path.name)]
    paths.sort(key=lambda path: ("reads_run" in _about(path), path.name))
    if not paths:
        raise UserError(f"There are no notebooks in {notebooks_dir()}; run this in a clone of the repository.")
    if only is None:
        return paths
    chosen: set[Path] = set()
    for asked in only:
        name = asked.strip().removesuffix(".ipynb")
        fitting = {path for path in paths if name == path.stem or name.zfill(2) == path.stem.split("_")[0]}
        if not fitting:
            raise UserError(f"There is no notebook {asked!r}; choose among {', '.join(path.stem for path in paths)}.")
        chosen |= fitting
    return [path for path in paths if path in chosen]


def reproduce(
    profile: str, only: Sequence[str] | None = None, force: bool = False, run_dir: str | Path | None = None
) -> list[NotebookStatus]:
    """Run the notebooks, until one fails, and write the page; one status per notebook.

    `only` is as in `find_notebooks`; `force` also runs what is up to date. `run_dir` is data/runs/<profile> by default.

    Raises:
        UserError: the profile or a notebook does not exist, papermill is missing, or the folder cannot be written.
    """
    settings = get_profile(profile)
    notebooks = find_notebooks(only)
    folder = store.require_writable(run_dir or store.data_dir() / "runs" / profile)
    log = notebook.read_object(folder / LOG_FILE)
    todo: list[Path] = []
    for path in notebooks:
        # What is about to run will change what a later notebook reads of this run.
        waits = todo and _about(path).get("reads_run")
        same = log.get(path.stem, {}).get("hash") == _hash(path, settings, folder)
        is_there = (folder / path.name).is_file() and path.stem in notebook.read_results(folder)
        if force or waits or not (same and is_there):
            todo.append(path)
    _tell(_plan(todo, len(notebooks), profile, log))
    statuses = [NotebookStatus(path.stem) for path in notebooks]
    for status, path in zip(statuses, notebooks, strict=True):
        if path not in todo:
            status.status, status.seconds = "up to date", log[path.stem]["seconds"]
            continue
        _tell(f"[{todo.index(path) + 1}/{len(todo)}] {path.stem} ...")
        digest, began = _hash(path, settings, folder), time.perf_counter()
        status.error = _run(path, folder, settings)
        status.seconds = round(time.perf_counter() - began, 1)
        status.status = "failed" if status.error else "done"
        if status.error:
            _tell(status.error)
            break
        with notebook.changed_json(folder / LOG_FILE) as log:
            log[path.stem] = {"hash": digest, "seconds": status.seconds, "commit": notebook.git_commit()}
        _tell(f"    done in {_minutes(status.seconds)}")
    write_index(folder, profile)
    _tell(f"Results: {folder / 'index.html'}")
    return statuses


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _plan(todo: Sequence[Path], n_all: int, profile: str, log: dict[str, Any]) -> str:
    if not todo:
        return f"All {n_all} notebooks are up to date (profile {profile}); --force runs them again."
    seconds = _expected_seconds(todo, profile, log)
    estimate = "time not known yet" if math.isnan(seconds) else f"about {_minutes(seconds)}"
    return f"{len(todo)} of {n_all} notebooks to run (profile {profile}): {estimate}."


def expected_minutes(profile: str) -> float:
    """Minutes of the last runs here, else as the notebooks state; NaN when one of them has neither.

    Raises:
        UserError: there are no notebooks.
    """
    log = notebook.read_object(store.data_dir() / "runs" / profile / LOG_FILE)
    return _expected_seconds(find_notebooks(), profile, log) / 60


def _expected_seconds(paths: Sequence[Path], profile: str, log: dict[str, Any]) -> float:
    """Notebooks' metadata hold minutes by profile, such as {"minutes": {"smoke": 1}}."""
    stated = {path.stem: 60 * _about(path).get("minutes", {}).get(profile, math.nan) for path in paths}
    return sum(log[name]["seconds"] if name in log else seconds for name, seconds in stated.items())


# ---- up to date


def _about(path: Path) -> dict[str, Any]:
    """A notebook's metadata for this module: `minutes`, `reads_run`."""
    return dict(store.read_json(path).get("metadata", {}).get("lorsa", {}))


def _hash(path: Path, profile: Profile, folder: Path) -> str:
    """Hash of all that decides a notebook's outputs."""
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in store.read_json(path)["cells"]]
    code = "\n".join(source for kind, source in cells if kind == "code")
    content = {
        "cells": cells,
        "package": _digests(imported_files(code), PACKAGE),
        "profile": profile.to_dict(),
        "expected": notebook.expected_values(path.stem, profile.name),
        "tables": _digests(store.data_dir().glob("*.csv"), store.data_dir()),
    }
    if _about(path).get("reads_run"):
        content["run"] = _run_state(folder, path.stem)
    return store.sha256_json(content)


def _digests(files: Iterable[Path], root: Path) -> dict[str, str]:
    return {file.relative_to(root).as_posix(): store.sha256_file(file) for file in files}


def imported_files(code: str) -> set[Path]:
    """Files of the package that code imports, directly or not, with the data files beside them."""
    files: set[Path] = set()
    waiting = _imports(re.sub(r"^[%!].*", "", code, flags=re.MULTILINE))
    while waiting:
        files.add(file := waiting.pop())
        waiting |= _imports_of(file, file.stat().st_mtime_ns) - files
    return files | {data for file in files for kind in ("*.toml", "templates/*") for data in file.parent.glob(kind)}


@functools.cache
def _imports_of(file: Path, changed: int) -> set[Path]:
    # The package itself declares for the type checker what it imports when a public name is used.
    return _imports(file.read_text(encoding="utf-8"), with_types=file == PACKAGE / "__init__.py")


def _imports(code: str, with_types: bool = False) -> set[Path]:
    """Files of the package that code imports; with `with_types` also those imported for the type checker alone."""
    nodes = [*ast.walk(ast.parse(code))]
    guards = [node for node in nodes if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    skipped = set() if with_types else {inner for guard in guards for inner in ast.walk(guard)}
    files: set[Path | None] = set()
    for node in nodes:
        if isinstance(node, ast.Import) and node not in skipped:
            files |= {_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            files |= {_file(f"{node.module}.{alias.name}") or _file(str(node.module)) for alias in node.names}
    return {file for file in files if file}


def _file(name: str) -> Path | None:
    package, *path = name.split(".")
    place = PACKAGE.joinpath(*path)
    files = (place.with_suffix(".py"), place / "__init__.py") if package == PACKAGE.name else ()
    return next((file for file in files if file.is_file()), None)


def _run_state(folder: Path, name: str) -> dict[str, Any]:
    labels = [record["label"] for record in figure_records(folder) if record["notebook"] != name]
    figures = (folder / "figures" / f"{label}.{ending}" for label in labels for ending in ("json", "csv"))
    lists = (paper_dir() / file for file in ("claims.csv", "figures.csv"))
    return {
        "results": {other: values for other, values in notebook.read_results(folder).items() if other != name},
        "figures": _digests(filter(Path.is_file, figures), folder),
        "lists": _digests(filter(Path.is_file, lists), paper_dir()),
    }


# ---- executing


def _run(path: Path, folder: Path, profile: Profile) -> str | None:
    """Why it failed; None when every cell passed."""
    output = folder / f"{path.stem}.failed.ipynb"
    output.unlink(missing_ok=True)
    try:
        _execute(path, output, folder, profile)
    except UserError:
        raise
    except Exception as error:  # papermill and its kernel raise many types
        return _failure(path.stem, output, error)
    _clean(output)
    os.replace(output, folder / path.name)
    _write_page(folder / path.name)
    return None


def _execute(path: Path, output: Path, folder: Path, profile: Profile) -> None:
    try:
        import papermill
    except ImportError as error:
        raise UserError('papermill is not installed; run: pip install "lorsa-utils[notebooks]"') from error
    parameters: dict[str, Any] = {"PROFILE": profile.name, "RUN_DIR": str(folder.absolute())}
    if "TRAIN" in papermill.inspect_notebook(str(path)):
        parameters["TRAIN"] = True  # a reader may look at the checkpoint alone; a reproduction trains what is missing
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(store.CHECKOUT) not in places:  # kernels import this very package, also where it is not installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(store.CHECKOUT), *places)))
    papermill.execute_notebook(
        str(path),
        str(output),
        parameters=parameters,
        cwd=str(path.parent),
        progress_bar=sys.stderr.isatty(),
        execution_timeout=CELL_TIMEOUT_SECONDS.get(profile.name, 14 * 24 * 3600),
        start_timeout=180,
    )


def _failure(name: str, output: Path, error: Exception) -> str:
    if name_of_error := getattr(error, "ename", None):
        reason = f"{name_of_error}: {getattr(error, 'evalue', '')}"
    elif "Timeout" in type(error).__name__:
        reason = "it ran longer than allowed"
    else:
        reason = f"{type(error).__name__}: {error}"
    # The message's first line says what happened; assertions and torch put explanations below it.
    reason = next(line.strip() for line in reason.splitlines() if line.strip())
    cells = store.read_json(output)["cells"] if output.is_file() else []
    states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells if cell["cell_type"] == "code"]
    # The last one that began, counted as Jupyter does; papermill calls one completed whose kernel died.
    cell = max((number for number, state in enumerate(states, 1) if state not in (None, "pending")), default=None)
    where = f"in cell [{cell}]" if cell else "before its first cell"
    return (
        f"{name} failed {where} ({reason}); see {output}, repair it and run the same command again: "
        "finished notebooks are skipped."
    )


def _clean(path: Path) -> None:
    """Drop widget state, which viewers reject, and this machine's paths."""
    content = store.read_json(path)
    content["metadata"].pop("widgets", None)
    for key in ("input_path", "output_path"):
        if value := content["metadata"].get("papermill", {}).get(key):
            content["metadata"]["papermill"][key] = Path(value).name
    store.write_json(path, content)


def _write_page(path: Path) -> None:
    """Write an offline page of the notebook, if nbconvert is installed; formulas stay as typed."""
    try:
        from nbconvert import HTMLExporter
    except ImportError:
        return
    page, _ = HTMLExporter().from_filename(str(path))
    store.write_text(
        path.with_suffix(".html"), re.sub(r'<script[^>]*\bsrc="https?://[^"]*"[^>]*>\s*</script>', "", page)
    )
