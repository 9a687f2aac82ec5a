"""Run all notebooks in order and write one page that shows what came out.

1. Notebooks are taken in the order of their numbers; one is skipped while its source, the package, the profile and its
   expected values are those of its last good run and its outputs are still there. One that shows what the others made
   (`reads_run` in its metadata) comes after them, and is skipped only while that is the same too.
2. papermill executes it with PROFILE and RUN_DIR set (and TRAIN where it has that), into a temporary file that becomes
   `NN_name.ipynb` only when every cell passed. A failing one is kept as `NN_name.failed.ipynb`, and the run stops
   there: later notebooks read earlier artefacts.
3. `index.html` lists figures and recorded values. It opens from the disk, offline.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorsa_utils import store
from lorsa_utils.config import Profile, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import notebook
from lorsa_utils.kit.claims import paper_dir
from lorsa_utils.view.gallery import figure_records, write_index

CELL_TIMEOUT_SECONDS = {"smoke": 900, "laptop": 3600, "paper": 14 * 24 * 3600}
"""A cell that runs longer is stopped, and its notebook fails."""


@dataclass
class NotebookStatus:
    """What happened to one notebook."""

    name: str
    """As `02_train_lorsa`."""
    status: str = "not run"
    """`done`, `up to date`, `failed` or `not run`."""
    seconds: float = 0.0
    """Of its last good run, or of the failed one."""
    error: str | None = None
    """One sentence, for a failed one."""

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-ready dict."""
        return asdict(self) | {"seconds": round(self.seconds, 1)}


def notebooks_dir() -> Path:
    """The folder with the numbered notebooks of this checkout."""
    return store.CHECKOUT / "notebooks"


def find_notebooks(folder: str | Path | None = None, only: Sequence[str] | None = None) -> list[Path]:
    """Notebooks `NN_name.ipynb` in the order of their numbers; those that show what the others made come last.

    Args:
        folder: where they are; those of the checkout by default.
        only: numbers or names to keep, as `02` or `02_train_lorsa`.

    Raises:
        UserError: there are none, or one in `only` does not exist.
    """
    place = notebooks_dir() if folder is None else Path(folder)
    found = sorted(
        (path for path in place.glob("*.ipynb") if re.match(r"\d+_", path.name)),
        key=lambda path: (_reads_run(path), _number(path.stem), path.stem),
    )
    if not found:
        raise UserError(f"There are no notebooks in {place}; run this in a clone of the repository.")
    if only is None:
        return found
    for asked in only:
        if not any(_is_asked(path.stem, asked) for path in found):
            raise UserError(f"There is no notebook {asked!r}; choose among {', '.join(path.stem for path in found)}.")
    return [path for path in found if any(_is_asked(path.stem, asked) for asked in only)]


def _number(stem: str) -> int:
    return int(stem.split("_")[0])


def _is_asked(stem: str, asked: str) -> bool:
    name = asked.strip().removesuffix(".ipynb")
    return stem == name or (name.isdigit() and _number(stem) == int(name))


def reproduce(
    profile: str,
    only: Sequence[str] | None = None,
    force: bool = False,
    *,
    run_dir: str | Path | None = None,
    source: str | Path | None = None,
) -> list[NotebookStatus]:
    """Run the notebooks and write the page; tells its progress on stderr.

    Args:
        profile: `smoke`, `laptop` or `paper`.
        only: numbers or names of notebooks; all without it.
        force: run also what is up to date.
        run_dir: where results go; data/runs/<profile> by default.
        source: folder with the notebooks; that of the checkout by default.

    Returns:
        one status a notebook; the run stops at the first that fails.

    Raises:
        UserError: the profile or a notebook does not exist, papermill is missing, or the folder cannot be written.
    """
    settings = get_profile(profile)
    notebooks = find_notebooks(source, only)
    folder = store.require_writable(run_dir or store.data_dir() / "runs" / profile)
    log = _read_log(folder)
    todo: list[Path] = []
    for path in notebooks:
        # What is about to run will change what a later notebook reads of this run.
        if (
            force
            or (todo and _reads_run(path))
            or not _is_up_to_date(folder, path.stem, _hash(path, settings, folder), log)
        ):
            todo.append(path)
    _tell(_plan(todo, len(notebooks), profile, log))
    statuses = [NotebookStatus(path.stem) for path in notebooks]
    for status, path in zip(statuses, notebooks, strict=True):
        if path not in todo:
            status.status, status.seconds = "up to date", log[path.stem]["seconds"]
            continue
        _tell(f"[{todo.index(path) + 1}/{len(todo)}] {path.stem} ...")
        digest = _hash(path, settings, folder)
        _run_one(path, folder, settings, status)
        if status.status == "failed":
            _tell(status.error or "")
            break
        log[path.stem] = {"hash": digest, "seconds": round(status.seconds, 1), "commit": notebook.git_commit()}
        store.write_json(folder / "reproduce.json", log)
        _tell(f"    done in {_minutes(status.seconds)}")
    write_index(folder, profile)
    _tell(f"Results: {folder / 'index.html'}")
    return statuses


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _plan(todo: Sequence[Path], n_all: int, profile: str, log: dict[str, Any]) -> str:
    """One line: what will run and how long it may take."""
    if not todo:
        return f"All {n_all} notebooks are up to date (profile {profile}); --force runs them again."
    known = [_expected_seconds(path, profile, log) for path in todo]
    estimate = f"about {_minutes(sum(seconds for seconds in known if seconds))}" if all(known) else "time not known yet"
    return f"{len(todo)} of {n_all} notebooks to run (profile {profile}): {estimate}."


def expected_minutes(profile: str, run_dir: str | Path | None = None) -> float | None:
    """Minutes of a whole run: those of the last one here, else what the notebooks say; None when one of them does not.

    Raises:
        UserError: there are no notebooks.
    """
    log = _read_log(Path(run_dir) if run_dir else store.data_dir() / "runs" / profile)
    known = [_expected_seconds(path, profile, log) for path in find_notebooks()]
    return sum(seconds for seconds in known if seconds) / 60 if all(known) else None


def _expected_seconds(path: Path, profile: str, log: dict[str, Any]) -> float | None:
    """Seconds of the last run here, else the minutes in the notebook's metadata: {"lorsa": {"minutes": {"smoke": 1}}}."""
    if path.stem in log:
        return float(log[path.stem]["seconds"])
    minutes = (
        json.loads(path.read_text(encoding="utf-8"))
        .get("metadata", {})
        .get("lorsa", {})
        .get("minutes", {})
        .get(profile)
    )
    return None if minutes is None else 60.0 * minutes


# ---- up to date


def _read_log(folder: Path) -> dict[str, Any]:
    file = folder / "reproduce.json"
    return dict(store.read_json(file)) if file.is_file() else {}


def _hash(path: Path, profile: Profile, folder: Path) -> str:
    """Hash of everything that decides a notebook's outputs: its cells, the package, the profile, the expected values, recorded tables."""
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in store.read_json(path)["cells"]]
    root = store.CHECKOUT / "lorsa_utils"
    package = {file.relative_to(root).as_posix(): store.sha256_file(file) for file in sorted(root.rglob("*.py"))}
    expected = notebook.expected_values(path.stem, profile.name)
    tables = {file.name: store.sha256_file(file) for file in sorted(store.data_dir().glob("*.csv"))}
    content = {"cells": cells, "package": package, "profile": profile.to_dict(), "expected": expected, "tables": tables}
    return store.sha256_json(content | ({"run": _run_state(folder, path.stem)} if _reads_run(path) else {}))


def _reads_run(path: Path) -> bool:
    return bool(store.read_json(path).get("metadata", {}).get("lorsa", {}).get("reads_run"))


def _run_state(folder: Path, name: str) -> dict[str, Any]:
    """Everything that a notebook can show of the others: their values, their figures, the claims."""
    results = {other: values for other, values in notebook.read_results(folder).items() if other != name}
    figures = {}
    for record in figure_records(folder):
        if record["notebook"] != name:
            files = (folder / "figures" / f"{record['label']}.{ending}" for ending in ("json", "csv"))
            figures[record["label"]] = [store.sha256_file(file) for file in files if file.is_file()]
    lists = (paper_dir() / "claims.csv", paper_dir() / "figures.csv")
    return {
        "results": results,
        "figures": figures,
        "lists": [store.sha256_file(file) for file in lists if file.is_file()],
    }


def _is_up_to_date(folder: Path, name: str, digest: str, log: dict[str, Any]) -> bool:
    same = log.get(name, {}).get("hash") == digest
    return same and (folder / f"{name}.ipynb").is_file() and name in notebook.read_results(folder)


# ---- executing


def _run_one(path: Path, folder: Path, profile: Profile, status: NotebookStatus) -> None:
    """Execute one notebook; its output takes its place only when all cells passed."""
    for left in folder.glob(f".{path.stem}.*.tmp.ipynb"):  # of a run that was killed
        left.unlink()
    partial = folder / f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp.ipynb"
    failed = folder / f"{path.stem}.failed.ipynb"
    began = time.perf_counter()
    try:
        _execute(path, partial, folder, profile)
    except UserError:
        raise
    except Exception as error:  # papermill and its kernel raise many types
        status.status = "failed"
        status.error = _failure(path.stem, partial, failed, error)
        if partial.is_file():
            os.replace(partial, failed)
    else:
        _clean(partial)
        os.replace(partial, folder / path.name)
        failed.unlink(missing_ok=True)
        _write_page(folder / path.name)
        status.status = "done"
    finally:
        partial.unlink(missing_ok=True)
        status.seconds = time.perf_counter() - began


def _execute(path: Path, output: Path, folder: Path, profile: Profile) -> None:
    try:
        import papermill
    except ImportError as error:
        raise UserError('papermill is not installed; run: pip install "lorsa-utils[notebooks]"') from error
    # A reader may look at the checkpoint alone; a reproduction trains what is missing.
    trained = {"TRAIN": True} if "TRAIN" in papermill.inspect_notebook(str(path)) else {}
    with _importable():
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters={"PROFILE": profile.name, "RUN_DIR": str(folder.absolute())} | trained,
            cwd=str(path.parent),
            progress_bar=sys.stderr.isatty(),
            execution_timeout=CELL_TIMEOUT_SECONDS.get(profile.name, CELL_TIMEOUT_SECONDS["paper"]),
            start_timeout=180,
        )


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Let kernels import this very package, also where it is not installed."""
    before = os.environ.get("PYTHONPATH")
    root = str(store.CHECKOUT)
    os.environ["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _failure(name: str, partial: Path, failed: Path, error: Exception) -> str:
    """Which cell failed and with what, in one sentence."""
    if name_of_error := getattr(error, "ename", None):
        reason = f"{name_of_error}: {getattr(error, 'evalue', '')}"
    elif "Timeout" in type(error).__name__:
        reason = "it ran longer than allowed"
    else:
        reason = f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    # The message's first line says what happened; assertions and torch put explanations below it.
    reason = lines[0] if lines else type(error).__name__
    cell = _failing_cell(partial)
    where = f"in cell [{cell}]" if cell else "before its first cell"
    return f"{name} failed {where} ({reason}); see {failed}, repair it and run the same command again: finished notebooks are skipped."


def _failing_cell(partial: Path) -> int | None:
    """Number of the cell that was running, counting code cells as Jupyter does."""
    if not partial.is_file():
        return None
    code = [cell for cell in store.read_json(partial)["cells"] if cell["cell_type"] == "code"]
    begun = None
    for number, cell in enumerate(code, 1):
        state = cell["metadata"].get("papermill", {})
        if state.get("exception") or state.get("status") in ("failed", "running"):
            return number
        if state.get("status") == "completed":
            begun = number
    return begun  # papermill calls a cell completed whose kernel died


def _clean(path: Path) -> None:
    """Drop widget state, which viewers reject, and paths of this machine."""
    content = store.read_json(path)
    content["metadata"].pop("widgets", None)
    for key in ("input_path", "output_path"):
        if value := content["metadata"].get("papermill", {}).get(key):
            content["metadata"]["papermill"][key] = Path(value).name
    store.write_json(path, content)


def _write_page(path: Path) -> None:
    """The executed notebook as a page that asks nobody, when nbconvert is installed; formulas stand in it as they were typed."""
    try:
        from nbconvert import HTMLExporter
    except ImportError:
        return
    page, _ = HTMLExporter().from_filename(str(path))
    store.write_text(
        path.with_suffix(".html"), re.sub(r'<script[^>]*\bsrc="https?://[^"]*"[^>]*>\s*</script>', "", page)
    )
