"""Run a model from a given block on: the only place where the Hugging Face module is changed, for one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def blocks_from(model: Any, path: str, layer: int, residual: Tensor) -> Iterator[None]:
    """Inside the context block `layer` of a model reads `residual`; earlier ones are gone. `path` is of their list."""
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    blocks: nn.ModuleList = getattr(parent, name)

    def read_residual(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return residual.to(model.device, model.dtype), *args[1:]

    hook = blocks[layer].register_forward_pre_hook(read_residual)
    # transformers looks up a layer's attention type by its place in the list: with several types none is left out.
    one_type = len(set(getattr(model.config, "layer_types", None) or [""])) == 1
    rest = nn.ModuleList()
    for number in range(layer if one_type else 0, len(blocks)):
        rest.add_module(str(number), blocks[number])  # under its own number, so that every layer's path stays
    setattr(parent, name, rest)
    try:
        yield
    finally:
        setattr(parent, name, blocks)
        hook.remove()
