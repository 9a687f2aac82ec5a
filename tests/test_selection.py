"""Whatever selects keeps the same units for every score; the kernels are compared in test_kernels.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import random_lorsa

from lorsa_utils import ops, store
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import formats, hub
from lorsa_utils.selection import SCORES, Selection

BY_HAND = {"relu": {1: 2.0, 3: 0.5}, "abs": {0: -3.0, 1: 2.0}}
"""Kept units of z = -3, 2, -1, 0.5 with norms 1, 2, 1, 1, and what they write."""


def by_unit(indices: torch.Tensor, values: torch.Tensor) -> dict[int, float]:
    return dict(zip(indices[0].tolist(), values[0].tolist(), strict=True))


@pytest.mark.parametrize("score", SCORES)
def test_every_consumer_selects_the_same(score: str) -> None:
    z, selection = torch.tensor([[-3.0, 2.0, -1.0, 0.5]]), Selection(2, torch.tensor([1.0, 2.0, 1.0, 1.0]), score)
    for backend in ("torch", "reference"):
        indices = ops.select_heads(z, selection, backend=backend)
        assert by_unit(indices, selection.activations(z.gather(1, indices))) == BY_HAND[score], backend
    q = torch.zeros(1, 1, 1, 2)
    encoded = ops.sparse_encode(z, torch.eye(4), torch.zeros(4), selection)
    attended = ops.sparse_attention(q, q, z.view(1, 1, 1, 4), 1.0, selection)
    assert by_unit(*encoded[:2]) == by_unit(*attended[:2]) == BY_HAND[score]


@pytest.mark.parametrize("score", SCORES)
def test_published_weights_keep_the_score_or_are_refused(score: str, tmp_path: Path) -> None:
    lorsa = random_lorsa(score=score)
    if not SCORES[score]:
        with pytest.raises(UserError, match=rf"\(score {score}\) is unknown to Language-Model-SAEs"):
            formats.llamascopium_config(lorsa.config, {})
        return
    lorsa.save(tmp_path / "run")
    hub.export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert formats.read(tmp_path / "out").lorsa.config.score == score


def test_what_keeps_no_fixed_number_is_refused_by_name(tmp_path: Path) -> None:
    random_lorsa().save(tmp_path / "run")
    hub.export_checkpoint(tmp_path / "run", tmp_path / "out")
    config = store.read_json(tmp_path / "out" / "config.json")
    store.write_json(tmp_path / "out" / "config.json", config | {"act_fn": "jumprelu"})
    with pytest.raises(UserError, match="act_fn 'jumprelu', which Lorsa here does not have"):
        formats.read(tmp_path / "out")
