"""Lorsa: low-rank sparse attention, from activations to readable heads (arXiv 2504.20938).

What stands here is the public API. Each name is imported when it is first used, so that importing the package is quick
and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorsa_utils.exceptions import UserError
    from lorsa_utils.layer import Layer, train
    from lorsa_utils.lorsa import SAE, Lorsa, load
    from lorsa_utils.metrics import evaluate
    from lorsa_utils.models import load_model
    from lorsa_utils.text import load_text

_HOMES = {
    "Layer": "layer",
    "Lorsa": "lorsa",
    "SAE": "lorsa",
    "UserError": "exceptions",
    "evaluate": "metrics",
    "load": "lorsa",
    "load_model": "models",
    "load_text": "text",
    "train": "layer",
}

__all__ = ["SAE", "Layer", "Lorsa", "UserError", "evaluate", "load", "load_model", "load_text", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
