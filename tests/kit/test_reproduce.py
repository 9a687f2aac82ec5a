import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lorsa_utils import store
from lorsa_utils.config import get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import reproduce


@pytest.fixture(autouse=True)
def own_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_STATIC_IMAGES", "0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(reproduce, "notebooks_dir", lambda: tmp_path / "notebooks")


def write_notebook(name: str, *cells: str, starts: bool = True, **about: Any) -> Path:
    """A notebook with these cells; `about` is its metadata for `reproduce`."""
    begin = f'from lorsa_utils.kit import notebook\nrun = notebook.start("{name}", PROFILE, RUN_DIR)'
    code = ['PROFILE = "laptop"\nRUN_DIR = ""', *[begin] * starts, *cells]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A lesson")])
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in code]
    book.cells[1].metadata["tags"] = ["parameters"]
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    book.metadata["lorsa"] = about
    path = reproduce.notebooks_dir() / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


def run(**options: Any) -> str:
    """Number and status of each notebook."""
    return ", ".join(f"{book.name[:2]} {book.status}" for book in reproduce.reproduce("smoke", **options))


def test_notebooks_run_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10_last", "02_second", "01_first"):
        write_notebook(name)
    write_notebook("03_shows_all", reads_run=True)
    (tmp_path / "notebooks" / "draft.ipynb").write_text("{}")

    def names(only: list[str] | None = None) -> list[str]:
        return [path.stem for path in reproduce.find_notebooks(only)]

    assert names() == ["01_first", "02_second", "10_last", "03_shows_all"]
    assert names(["10", "1"]) == ["01_first", "10_last"]
    assert names(["02_second"]) == ["02_second"]


def test_bad_requests_are_named() -> None:
    with pytest.raises(UserError, match="no notebooks in"):
        reproduce.find_notebooks()
    write_notebook("01_first")
    with pytest.raises(UserError, match="no notebook '07'; choose among 01_first"):
        run(only=["07"])
    with pytest.raises(UserError, match="no profile 'huge'"):
        reproduce.reproduce("huge")


def test_plan_adds_up_what_is_known() -> None:
    paths = [write_notebook(name, minutes={"smoke": n}) for name, n in (("01_first", 2), ("02_second", 3))]
    assert "2 of 2 notebooks to run (profile smoke): about 5.0 minutes" in reproduce._plan(paths, 2, "smoke", {})
    assert "about 2.5 minutes" in reproduce._plan(paths, 2, "smoke", {"02_second": {"seconds": 30}})
    assert "time not known yet" in reproduce._plan([*paths, write_notebook("03_third")], 3, "smoke", {})
    assert "up to date" in reproduce._plan([], 3, "smoke", {})


@pytest.mark.slow
def test_a_reproduction_trains_what_a_reader_need_not() -> None:
    path = write_notebook("01_first", "assert TRAIN", "run.record('train', TRAIN)")
    write_notebook("02_second", "assert 'TRAIN' not in globals()", starts=False)
    book = nbformat.read(path, as_version=4)
    book.cells[1].source += "\nTRAIN = False"
    nbformat.write(book, path)
    assert run() == "01 done, 02 done"


@pytest.mark.slow
def test_a_run_is_skipped_while_nothing_changed_and_repeated_when_something_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = 'import plotly.graph_objects as go\nrun.show(go.Figure(go.Scatter(y=[3, 4])), "P4_test", "Is <b> & bold?")'
    write_notebook("01_first", figure, 'run.record("fvu", 0.25)\nrun.record("<script>", 1)', "run.finish()")
    write_notebook("02_second", 'from pathlib import Path\nassert (Path(RUN_DIR) / "01_first.ipynb").exists()')
    store.write_json(tmp_path / "data" / "expected" / "01_first.json", {"smoke": {"fvu": {"max": 0.3}}})
    folder = tmp_path / "data" / "runs" / "smoke"

    assert run() == "01 done, 02 done"
    output = nbformat.read(folder / "01_first.ipynb", as_version=4)
    nbformat.validate(output)
    assert "widgets" not in output.metadata
    page = (folder / "01_first.html").read_text(encoding="utf-8")
    assert "P4_test" in page
    assert not re.search(r'src="https?:', page)
    assert not list(folder.glob("*.failed.ipynb"))

    assert run() == "01 up to date, 02 up to date"
    assert "All 2 notebooks are up to date" in capsys.readouterr().err

    write_notebook("02_second", "1 + 1")
    assert run() == "01 up to date, 02 done"
    (folder / "01_first.ipynb").unlink()
    assert run(only=["01"]) == "01 done"
    assert run(only=["02"], force=True) == "02 done"

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
    write_notebook("01_first", "x = 1")
    write_notebook("02_second", "x = 1", 'raise ValueError("the head is dead\\nlong story")', "never = 1")
    write_notebook("03_third")
    folder = tmp_path / "data" / "runs" / "smoke"
    assert run() == "01 done, 02 failed, 03 not run"
    # parameters, injected parameters, start, x = 1, then the one that fails
    assert "02_second failed in cell [5] (ValueError: the head is dead); see" in capsys.readouterr().err
    assert not (folder / "02_second.ipynb").exists()
    partial = nbformat.read(folder / "02_second.failed.ipynb", as_version=4)
    assert any("the head is dead" in str(cell.get("outputs")) for cell in partial.cells)
    assert (folder / "index.html").is_file()
    (folder / "02_second.failed.ipynb").write_text('{"cells": [')  # as a killed run leaves it
    write_notebook("02_second", "x = 1")
    assert run() == "01 up to date, 02 done, 03 done"
    assert not (folder / "02_second.failed.ipynb").exists()


@pytest.mark.slow
def test_a_cell_that_hangs_or_a_kernel_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reproduce.CELL_TIMEOUT_SECONDS, "smoke", 5)
    for code, reason in (
        ("import os\nos._exit(3)", "("),
        ("import time\ntime.sleep(600)", "(it ran longer than allowed)"),
    ):
        write_notebook("01_dies", code, starts=False)
        (status,) = reproduce.reproduce("smoke")
        assert status.error
        assert status.error.startswith(f"01_dies failed in cell [3] {reason}")


def digest(path: Path, folder: Path, **changes: Any) -> str:
    return reproduce._hash(path, get_profile("smoke").replace(**changes), folder)


def test_changes_of_profile_tables_or_expected_values_make_a_run_stale(tmp_path: Path) -> None:
    path, expected = write_notebook("01_first"), tmp_path / "data" / "expected" / "01_first.json"
    before = digest(path, tmp_path)
    assert len({before, digest(path, tmp_path, name="laptop"), digest(path, tmp_path, k=16)}) == 3
    store.write_json(expected, {"laptop": {"fvu": {"max": 1}}})
    assert digest(path, tmp_path) == before
    store.write_json(expected, {"smoke": {"fvu": {"max": 1}}})
    changed = digest(path, tmp_path)
    assert changed != before
    store.write_text(store.data_dir() / "benchmarks.csv", "shape\nA\n")
    after = digest(path, tmp_path)
    assert after != changed
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert digest(path, tmp_path) == after, "outputs saved in the source do not matter"


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
    path = write_notebook("01_first", "%matplotlib inline\nfrom lorsa_utils import used")
    before = digest(path, tmp_path)
    for name in ("alone.py", "public.py", "__init__.py"):
        store.write_text(package / name, "changed = True")
        assert digest(path, tmp_path) == before, name
    for name in ("used.py", "rooms/deep.py", "rooms/templates/page.html"):
        content = (package / name).read_text()
        store.write_text(package / name, content + "\nchanged = True")
        assert digest(path, tmp_path) != before, name
        store.write_text(package / name, content)
    assert digest(path, tmp_path) == before


@pytest.mark.parametrize("code", ["import lorsa_utils as lu", "from lorsa_utils import Name"])
def test_public_names_count_as_their_homes(package: Path, code: str) -> None:
    assert reproduce.imported_files(code) == {package / "__init__.py", package / "public.py"}


def code_of(book: Any) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")


def test_modules_of_the_notebooks_are_found() -> None:
    code = code_of(nbformat.read(store.CHECKOUT / "notebooks" / "08_circuits.ipynb", as_version=4))
    names = {file.relative_to(reproduce.PACKAGE).as_posix() for file in reproduce.imported_files(code)}
    assert {"circuits/graph.py", "kit/notebook.py", "ops.py", "store.py"} <= names
    assert not {"kit/cli.py", "autointerp/study.py", "kit/bench.py"} & names


def test_a_notebook_that_shows_the_run_follows_what_the_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(path: Path, output: Path, folder: Path, profile: Any) -> None:
        """In this process, without a kernel."""
        book = nbformat.read(path, as_version=4)
        exec(code_of(book).replace('RUN_DIR = ""', f"RUN_DIR = {str(folder)!r}").replace('"laptop"', '"smoke"'), {})
        nbformat.write(book, output)

    monkeypatch.setattr(reproduce, "_execute", execute)
    folder = tmp_path / "data" / "runs" / "smoke"
    write_notebook("01_first", 'run.record("fvu", 0.25)')
    write_notebook("02_book", reads_run=True)
    assert run() == "01 done, 02 done"
    assert run() == "01 up to date, 02 up to date"
    assert run(only=["01"], force=True) == "01 done"
    assert run() == "01 up to date, 02 up to date", "the same numbers came out"
    write_notebook("01_first", 'run.record("fvu", 0.3)')
    assert run(only=["01"]) == "01 done"
    assert run() == "01 up to date, 02 done"
    write_notebook("01_first", 'run.record("fvu", 0.3)', "1")
    assert run() == "01 done, 02 done", "one run brings both up to date"
    about = {"label": "P4_x", "notebook": "01_first", "caption": "", "profile": "smoke"}
    store.write_json(folder / "figures" / "P4_x.json", about)
    store.write_text(folder / "figures" / "P4_x.html", "x")
    assert run() == "01 up to date, 02 done"


def test_empty_results_make_a_page_too(tmp_path: Path) -> None:
    page = reproduce.write_index(tmp_path, "paper").read_text(encoding="utf-8")
    assert "paper" in page
    assert "scaled down" not in page
