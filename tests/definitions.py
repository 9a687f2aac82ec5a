"""What a notebook defines, for tests: its imports, functions and classes, without running the rest of it."""

import ast
import sys
from types import ModuleType

import nbformat

from lorsa_utils.kit import reproduce


def definitions(name: str) -> ModuleType:
    """A module of the imports, functions and classes in the code cells of notebook `name`."""
    book = nbformat.read(reproduce.notebooks_dir() / f"{name}.ipynb", as_version=4)
    source = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    module = sys.modules[f"notebook_{name}"] = ModuleType(f"notebook_{name}")
    exec(compile(tree, name, "exec"), module.__dict__)
    return module
