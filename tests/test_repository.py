"""What holds for the repository as a whole: floors, safe files, clean notebooks, complete pins, a quiet import."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lorsa_utils"

# Each module imports only from modules before it: the core first, then room by room.
FLOORS = (
    *("exceptions", "store", "selection", "config"),
    *("reference", "kernels", "ops"),
    *("fetch", "architectures", "resume", "models", "prose", "corpus", "text", "lorsa", "activations"),
    *("processes", "initialize", "metrics", "training", "stats"),
    *("heads", "heads.prompts", "heads.units", "heads.families", "heads.discovery", "heads.survey", "heads.origins"),
    *("heads.arithmetic", "heads.tasks"),
    *("autointerp", "autointerp.examples", "autointerp.rules", "autointerp.judges", "autointerp.study"),
    *("circuits", "circuits.nodes", "circuits.graph", "circuits.faithfulness"),
    *("kit", "kit.bench", "kit.sweeps", "kit.scaling", "kit.formats", "kit.hub", "kit.dark_matter"),
    *("toys", "toys.sparse_transformer"),
    *("view", "view.evidence", "view.pages", "view.explorer", "view.figures"),
    "layer",
    *("kit.notebook", "kit.recipes", "kit.claims", "view.gallery", "kit.reproduce", "kit.doctor"),
    *("kit.commands", "kit.cli"),
    "__main__",
)
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# torch pins these itself, and only on machines of their kind; the last row are parts of other systems and Python
# versions.
UNPINNED = re.compile(r"(nvidia|cuda|triton)(-|$)|(pip|setuptools|appnope|colorama|pywin32|pywinpty)$")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    """`heads.units` for lorsa_utils/heads/units.py, `heads` for that folder's __init__.py."""
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that some code imports, wherever in it, by their path in the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            package, _, module = (node.module or "").partition(".")
            if package == PACKAGE:
                below = [f"{module}.{alias.name}".strip(".") for alias in node.names]
                yield from [name for name in below if name in FLOORS] or [module or node.names[0].name]


def floor_problems(name: str, source: str) -> list[str]:
    if name not in FLOORS:
        return [f"{name} is new: add it to FLOORS in tests/test_repository.py, after everything it imports."]
    late = {*imports(ast.parse(source))} - {*FLOORS[: FLOORS.index(name)], "__version__"}
    return [f"{name} must not import {used}, which stands on a later floor." for used in late]


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name != PACKAGE or path.stem != "__init__"], ids=module_name
)
def test_modules_import_only_from_floors_before_them(path: Path) -> None:
    assert not floor_problems(module_name(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from lorsa_utils.kit import cli", "kit.cli"),
        ("import lorsa_utils.kit.cli", "kit.cli"),
        ("def f():\n    from lorsa_utils.kit.cli import main", "kit.cli"),
        ("from lorsa_utils import training", "training"),
    ],
)
def test_floor_check_sees_every_kind_of_import(source: str, used: str) -> None:
    assert floor_problems("ops", source) == [f"ops must not import {used}, which stands on a later floor."]
    assert "is new" in floor_problems("brand_new", source)[0]


def test_importing_the_package_and_its_settings_needs_no_torch() -> None:
    code = f"import sys, {PACKAGE}.config, {PACKAGE}.exceptions; "
    code += "print([name for name in ('torch', 'numpy', 'pandas') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "eval", "exec", "pd.read_pickle", "pandas.read_pickle"}
UNSAFE_OPTIONS = {"allow_pickle", "trust_remote_code"}


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that arrived as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and options.get("weights_only") == "True":
                continue
            if called in UNSAFE_CALLS or called.endswith(".to_pickle"):
                yield f"{called}("
            yield from (f"{option}=" for option in options if option in UNSAFE_OPTIONS)


@cache
def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def code_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    lines = "\n".join(cell.source for cell in code_cells(path)).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


@pytest.mark.parametrize(
    "path", MODULES + NOTEBOOKS, ids=lambda path: path.stem if path.suffix == ".ipynb" else module_name(path)
)
def test_no_data_is_ever_run_as_code(path: Path) -> None:
    assert not list(unsafe_calls(ast.parse(code_of(path))))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval('1')",
        "f(trust_remote_code=True)",
        "exec(s)",
    ],
)
def test_unsafe_code_is_seen(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source)))
    assert not list(unsafe_calls(ast.parse("model.eval(); load_file(p); np.load(p); torch.load(p, weights_only=True)")))


MACHINE_PATH = re.compile(r"(?<![\w.:/$}~-])/(?:home|Users|root|work|tmp|opt)/\w|[A-Z]:\\\\?Users\\")


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if MACHINE_PATH.search(line)]
    assert not found


def test_machine_paths_are_seen() -> None:
    assert MACHINE_PATH.search('open("' + "/ho" + 'me/ann/x")')
    assert MACHINE_PATH.search("C:" + "\\Users\\ann")
    assert not MACHINE_PATH.search("https://example.org/home/page and docs/work/x and a/tmp/b")


def test_tracked_files_are_small() -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked_files()}
    shipped = {path: size for path, size in sizes.items() if path.parts[:2] == ("data", "checkpoints")}
    assert sum(shipped.values()) <= 25_000_000
    assert not {path: size for path, size in sizes.items() if path not in shipped and size >= 2_000_000}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    def test_is_valid_and_small(self, path: Path) -> None:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
        assert path.stat().st_size <= 150_000
        assert "widgets" not in notebook.metadata, "GitHub refuses to show notebooks with metadata.widgets"

    def test_has_one_parameters_cell(self, path: Path) -> None:
        cells = nbformat.read(path, as_version=4).cells
        assert [cell.cell_type for cell in cells if "parameters" in cell.metadata.get("tags", [])] == ["code"]

    def test_keeps_only_the_outputs_it_means_to_keep(self, path: Path) -> None:
        with_output = [cell for cell in code_cells(path) if cell.outputs]
        assert not [cell.source for cell in with_output if "keep_output" not in cell.metadata.get("tags", [])]
        assert not [cell.source for cell in with_output if "error" in {output.output_type for output in cell.outputs}]

    def test_installs_nothing_and_runs_no_other_notebook(self, path: Path) -> None:
        source = "\n".join(cell.source for cell in code_cells(path))
        assert not re.search(r"^\s*[%!]\s*(run|pip|conda)\b", source, flags=re.MULTILINE)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    """Name to version, in the order of the file. Every line is `name==version` and nothing more."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines if not line.startswith("#")]
    assert all(matches), "constraints.txt holds a line that is not name==version; run `make lock`"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def wanted(extra: str | None = None) -> list[Requirement]:
    """Dependencies of the package, or of one of its extras with the extras that it names."""
    table = project()
    listed = list(map(Requirement, table["optional-dependencies"][extra] if extra else table["dependencies"]))
    own = [item for item in listed if canonicalize_name(item.name) == table["name"]]
    return [item for item in listed if item not in own] + [
        item for requirement in own for name in requirement.extras for item in wanted(name)
    ]


def test_constraints_pin_every_dependency_and_torch_first() -> None:
    pinned = pins()
    assert next(iter(pinned)) == "torch"
    for requirement in wanted() + wanted("all"):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned; run `make lock`"
        assert requirement.specifier.contains(version), f"{requirement} is not met by {version}; run `make lock`"


def test_constraints_pin_what_the_dependencies_need_in_turn() -> None:
    pinned, seen = pins(), set()
    queue = wanted() + wanted("all")
    while queue:
        parent = queue.pop()
        for requirement in map(Requirement, importlib.metadata.requires(parent.name) or []):
            extras, marker = ("", *sorted(parent.extras)), requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
            if key not in seen and not UNPINNED.match(key[0]):
                seen.add(key)
                assert key[0] in pinned, f"{key[0]}, needed by {parent.name}, is not pinned; run `make lock`"
                queue.append(requirement)
    assert len(seen) > 50


def test_conda_installs_the_same_list() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert re.search(r"- pip:\n\s+- -c constraints.txt\n\s+- -e \.\[all\]\n", text)


def test_version_is_told_once() -> None:
    assert "version" in project()["dynamic"]
    version = importlib.metadata.version("lorsa-utils")
    assert f'__version__ = "{version}"' in (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_importing_the_package_draws_no_random_number() -> None:
    script = f"""
import importlib, random, numpy, torch
def state():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.initial_seed()
before = state()
for name in {[module_name(path) for path in MODULES if path.stem not in ("__init__", "__main__")]!r}:
    importlib.import_module("{PACKAGE}." + name)
assert before == state()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
