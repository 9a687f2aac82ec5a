"""Lorsa: low-rank sparse attention, from activations to readable heads (arXiv 2504.20938).

    import lorsa_utils as lu

    model = lu.load_model("smollm2")
    layer = lu.Layer.from_pretrained("data/checkpoints/smollm2-17-lorsa")

What stands here is the public API; each name is imported when it is first used, so importing the package is quick and
needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorsa_utils.exceptions import UserError
    from lorsa_utils.lorsa import SAE, Lorsa, load
    from lorsa_utils.models import load_model

_HOMES = {
    "SAE": "lorsa",
    "Lorsa": "lorsa",
    "UserError": "exceptions",
    "load": "lorsa",
    "load_model": "models",
}

__all__ = ["SAE", "Lorsa", "UserError", "load", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
