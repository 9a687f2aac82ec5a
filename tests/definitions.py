"""What a notebook defines, for tests: its imports, functions and classes, without running the rest of it."""

import ast
import sys
from types import ModuleType

import nbformat

from lorsa_utils.kit import reproduce


def definitions(name: str, *wanted: str) -> ModuleType:
    """A module of the imports and the functions and classes of notebook `name`, or of the wanted ones alone."""
    book = nbformat.read(reproduce.notebooks_dir() / f"{name}.ipynb", as_version=4)
    tree = ast.parse("\n".join(cell.source for cell in book.cells if cell.cell_type == "code"))
    defined = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (not wanted or node.name in wanted)
    ]
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)] + defined
    module = sys.modules[f"notebook_{name}"] = ModuleType(f"notebook_{name}")
    exec(compile(tree, name, "exec"), module.__dict__)
    return module
