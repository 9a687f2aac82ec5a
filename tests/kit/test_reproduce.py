import functools
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lorsa_utils import store
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import reproduce
from lorsa_utils.view import figures


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LORSA_STATIC_IMAGES", "0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


# The second leaves what the first leaves, without the seconds that a kernel needs to load torch.
START = """from lorsa_utils.kit import notebook
run = notebook.start({name!r}, PROFILE, RUN_DIR)"""
QUICK_START = """import json, pathlib
file = pathlib.Path(RUN_DIR, "results.json")
file.write_text(json.dumps({{**(json.loads(file.read_text()) if file.exists() else {{}}), {name!r}: {{}}}}))"""


def write_notebook(
    tmp_path: Path,
    name: str,
    *cells: str,
    minutes: float | None = None,
    reads_run: bool = False,
    start: str | None = START,
) -> Path:
    parameters = nbformat.v4.new_code_cell('PROFILE = "laptop"\nRUN_DIR = ""')
    parameters.metadata["tags"] = ["parameters"]
    begin = [nbformat.v4.new_code_cell(start.format(name=name))] if start else []
    code = [parameters, *begin, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A lesson"), *code])
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    if minutes is not None:
        book.metadata["lorsa"] = {"minutes": {"smoke": minutes}}
    if reads_run:
        book.metadata["lorsa"] = {"reads_run": True}
    path = tmp_path / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


def run(tmp_path: Path, **options: Any) -> dict[str, str]:
    statuses = reproduce.reproduce("smoke", source=tmp_path / "notebooks", run_dir=tmp_path / "run", **options)
    return {status.name: status.status for status in statuses}


def test_notebooks_run_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10_last", "02_second", "01_first"):
        write_notebook(tmp_path, name)
    write_notebook(tmp_path, "03_shows_all", reads_run=True)
    (tmp_path / "notebooks" / "draft.ipynb").write_text("{}")
    assert [path.stem for path in reproduce.find_notebooks(tmp_path / "notebooks")] == [
        "01_first",
        "02_second",
        "10_last",
        "03_shows_all",
    ]
    assert [path.stem for path in reproduce.find_notebooks(tmp_path / "notebooks", ["10", "1"])] == [
        "01_first",
        "10_last",
    ]
    assert [path.stem for path in reproduce.find_notebooks(tmp_path / "notebooks", ["02_second"])] == ["02_second"]


def test_bad_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no notebooks in"):
        reproduce.find_notebooks(tmp_path / "nowhere")
    write_notebook(tmp_path, "01_first")
    with pytest.raises(UserError, match="no notebook '07'; choose among 01_first"):
        run(tmp_path, only=["07"])
    with pytest.raises(UserError, match="no profile 'huge'"):
        reproduce.reproduce("huge", source=tmp_path / "notebooks")


def test_plan_adds_up_what_is_known(tmp_path: Path) -> None:
    paths = [write_notebook(tmp_path, "01_first", minutes=2), write_notebook(tmp_path, "02_second", minutes=3)]
    assert "2 of 2 notebooks to run (profile smoke): about 5.0 minutes" in reproduce._plan(paths, 2, "smoke", {})
    assert "about 2.5 minutes" in reproduce._plan(paths, 2, "smoke", {"02_second": {"seconds": 30}})
    assert "time not known yet" in reproduce._plan([*paths, write_notebook(tmp_path, "03_third")], 3, "smoke", {})
    assert "up to date" in reproduce._plan([], 3, "smoke", {})


@pytest.mark.slow
def test_a_reproduction_trains_what_a_reader_need_not(tmp_path: Path) -> None:
    path = write_notebook(tmp_path, "01_first", "assert TRAIN", "run.record('train', TRAIN)")
    write_notebook(tmp_path, "02_second", "assert 'TRAIN' not in globals()", start=None)
    book = nbformat.read(path, as_version=4)
    book.cells[1].source += "\nTRAIN = False"
    nbformat.write(book, path)
    assert run(tmp_path) == {"01_first": "done", "02_second": "done"}


@pytest.mark.slow
def test_a_run_is_skipped_while_nothing_changed_and_repeated_when_something_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = 'import plotly.graph_objects as go\nrun.show(go.Figure(go.Scatter(y=[3, 4])), "P4_test", "Is <b> & bold?")'
    write_notebook(tmp_path, "01_first", figure, 'run.record("fvu", 0.25)\nrun.record("<script>", 1)', "run.finish()")
    exists = 'assert pathlib.Path(RUN_DIR, "01_first.ipynb").exists()'
    second = write_notebook(tmp_path, "02_second", exists, start=QUICK_START)
    store.write_json(tmp_path / "data" / "expected" / "01_first.json", {"smoke": {"fvu": {"max": 0.3}}})
    folder = tmp_path / "run"

    assert run(tmp_path) == {"01_first": "done", "02_second": "done"}
    output = nbformat.read(folder / "01_first.ipynb", as_version=4)
    nbformat.validate(output)
    assert "widgets" not in output.metadata
    page = (folder / "01_first.html").read_text(encoding="utf-8")
    assert "P4_test" in page
    assert not re.search(r'src="https?:', page)
    assert not list(folder.glob("*.failed.ipynb"))

    assert run(tmp_path) == {"01_first": "up to date", "02_second": "up to date"}
    assert "All 2 notebooks are up to date" in capsys.readouterr().err

    write_notebook(tmp_path, "02_second", "1 + 1", start=QUICK_START)
    assert run(tmp_path) == {"01_first": "up to date", "02_second": "done"}
    (folder / "01_first.ipynb").unlink()
    assert run(tmp_path, only=["01"]) == {"01_first": "done"}
    assert run(tmp_path, only=["02"], force=True) == {"02_second": "done"}
    assert second.is_file()
    check_index(folder)


def check_index(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "Is &lt;b&gt; &amp; bold?" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "://" not in page, "it asks nobody"
    assert re.search(r"<td>fvu</td><td>0.25</td><td>at most 0.3</td><td class=\"PASS\">PASS</td>", page)
    for target in set(re.findall(r'(?:src|href)="([^"#]+)"', page)) - {"data:,"}:
        assert (folder / target).is_file(), target
    assert 'src="figures/P4_test.html"' in page, "without an image the interactive figure is shown in a frame"
    (folder / "figures" / "P4_test.png").write_bytes(b"png")
    assert 'src="figures/P4_test.png"' in reproduce.write_index(folder, "smoke").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_failing_notebook_is_named_with_its_cell_and_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = functools.partial(write_notebook, tmp_path, start=QUICK_START)
    write("01_first", "x = 1")
    write("02_second", "x = 1", 'raise ValueError("the head is dead\\nlong story")', "never = 1")
    write("03_third")
    folder = tmp_path / "run"
    assert run(tmp_path) == {"01_first": "done", "02_second": "failed", "03_third": "not run"}
    # parameters, injected parameters, start, x = 1, then the one that fails
    assert "02_second failed in cell [5] (ValueError: the head is dead); see" in capsys.readouterr().err
    assert not (folder / "02_second.ipynb").exists()
    partial = nbformat.read(folder / "02_second.failed.ipynb", as_version=4)
    assert any("the head is dead" in str(cell.get("outputs")) for cell in partial.cells)
    assert (folder / "index.html").is_file()
    (folder / "02_second.failed.ipynb").write_text('{"cells": [')  # as a killed run leaves it
    write("02_second", "x = 1")
    assert run(tmp_path) == {"01_first": "up to date", "02_second": "done", "03_third": "done"}
    assert not (folder / "02_second.failed.ipynb").exists()


@pytest.mark.slow
def test_a_cell_that_hangs_or_a_kernel_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reproduce.CELL_TIMEOUT_SECONDS, "smoke", 5)
    write_notebook(tmp_path, "01_dies", "import os\nos._exit(3)", start=None)
    (status,) = reproduce.reproduce("smoke", source=tmp_path / "notebooks", run_dir=tmp_path / "run")
    assert status.error
    assert status.error.startswith("01_dies failed in cell [3] (")
    write_notebook(tmp_path, "01_dies", "import time\ntime.sleep(600)", start=None)
    (status,) = reproduce.reproduce("smoke", source=tmp_path / "notebooks", run_dir=tmp_path / "run")
    assert status.error
    assert "in cell [3] (it ran longer than allowed)" in status.error


def test_changes_of_profile_tables_or_expected_values_make_a_run_stale(tmp_path: Path) -> None:
    path = write_notebook(tmp_path, "01_first")
    smoke, laptop = reproduce.get_profile("smoke"), reproduce.get_profile("laptop")
    before = reproduce._hash(path, smoke, tmp_path)
    assert reproduce._hash(path, laptop, tmp_path) != before
    assert reproduce._hash(path, smoke.replace(k=16), tmp_path) != before
    store.write_json(tmp_path / "data" / "expected" / "01_first.json", {"laptop": {"fvu": {"max": 1}}})
    assert reproduce._hash(path, smoke, tmp_path) == before
    store.write_json(tmp_path / "data" / "expected" / "01_first.json", {"smoke": {"fvu": {"max": 1}}})
    changed = reproduce._hash(path, smoke, tmp_path)
    assert changed != before
    store.write_text(store.data_dir() / "benchmarks.csv", "shape\nA\n")
    after = reproduce._hash(path, smoke, tmp_path)
    assert after != changed
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert reproduce._hash(path, smoke, tmp_path) == after, "outputs saved in the source do not matter"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in which `used` leads to rooms/deep.py, and two modules that it does not need."""
    files = {
        "__init__.py": "if TYPE_CHECKING:\n    from lorsa_utils.public import Name",
        "public.py": "",
        "used.py": "def f():\n    from lorsa_utils.rooms import deep\nif TYPE_CHECKING:\n    import lorsa_utils.alone",
        "rooms/__init__.py": "",
        "rooms/deep.py": "from lorsa_utils.used import f",
        "rooms/templates/page.html": "page",
        "alone.py": "from lorsa_utils import used",
    }
    root = tmp_path / "lorsa_utils"
    for name, code in files.items():
        store.write_text(root / name, code)
    monkeypatch.setattr(reproduce, "PACKAGE", root)
    return root


def test_a_notebook_is_stale_when_a_module_that_it_imports_changes_and_not_when_another_does(
    tmp_path: Path, package: Path
) -> None:
    path = write_notebook(tmp_path, "01_first", "%matplotlib inline\nfrom lorsa_utils import used")
    before = reproduce._hash(path, reproduce.get_profile("smoke"), tmp_path)
    for name in ("alone.py", "public.py", "__init__.py"):
        store.write_text(package / name, "changed = True")
        assert reproduce._hash(path, reproduce.get_profile("smoke"), tmp_path) == before, name
    for name in ("used.py", "rooms/deep.py", "rooms/templates/page.html"):
        content = (package / name).read_text(encoding="utf-8")
        store.write_text(package / name, content + "\nchanged = True")
        assert reproduce._hash(path, reproduce.get_profile("smoke"), tmp_path) != before, name
        store.write_text(package / name, content)
    assert reproduce._hash(path, reproduce.get_profile("smoke"), tmp_path) == before


@pytest.mark.parametrize("code", ["import lorsa_utils as lu", "from lorsa_utils import Name"])
def test_public_names_count_as_their_homes(package: Path, code: str) -> None:
    assert reproduce.imported_files(code) == {package / "__init__.py", package / "public.py"}


def test_modules_of_the_notebooks_are_found() -> None:
    source = json.loads((reproduce.notebooks_dir() / "08_circuits.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in source["cells"] if cell["cell_type"] == "code")
    names = {file.relative_to(reproduce.PACKAGE).as_posix() for file in reproduce.imported_files(code)}
    assert {"circuits/graph.py", "kit/notebook.py", "ops.py", "store.py"} <= names
    assert not {"kit/cli.py", "autointerp/study.py", "kit/bench.py"} & names


def test_a_notebook_that_shows_the_run_follows_what_the_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(path: Path, output: Path, folder: Path, profile: Any) -> None:
        """In this process, without a kernel."""
        book = nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
        exec(code.replace('RUN_DIR = ""', f"RUN_DIR = {str(folder)!r}").replace('"laptop"', '"smoke"'), {})
        nbformat.write(book, output)

    monkeypatch.setattr(reproduce, "_execute", execute)
    folder = tmp_path / "run"
    write_notebook(tmp_path, "01_first", 'run.record("fvu", 0.25)')
    write_notebook(tmp_path, "02_book", reads_run=True)
    assert run(tmp_path) == {"01_first": "done", "02_book": "done"}
    assert run(tmp_path) == {"01_first": "up to date", "02_book": "up to date"}
    assert run(tmp_path, only=["01"], force=True) == {"01_first": "done"}
    assert run(tmp_path) == {"01_first": "up to date", "02_book": "up to date"}, "the same numbers came out"
    write_notebook(tmp_path, "01_first", 'run.record("fvu", 0.3)')
    assert run(tmp_path, only=["01"]) == {"01_first": "done"}
    assert run(tmp_path) == {"01_first": "up to date", "02_book": "done"}
    write_notebook(tmp_path, "01_first", 'run.record("fvu", 0.3)', "1")
    assert run(tmp_path) == {"01_first": "done", "02_book": "done"}, "one run brings both up to date"
    store.write_json(
        folder / "figures" / "P4_x.json", {"label": "P4_x", "notebook": "01_first", "caption": "", "profile": "smoke"}
    )
    (folder / "figures" / "P4_x.html").write_text("x")
    assert run(tmp_path) == {"01_first": "up to date", "02_book": "done"}


def test_empty_results_make_a_page_too(tmp_path: Path) -> None:
    page = reproduce.write_index(tmp_path, "paper").read_text(encoding="utf-8")
    assert "paper" in page
    assert "scaled down" not in page
    assert figures.PALETTE
