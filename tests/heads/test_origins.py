"""Shares against plain loops and against layers in which the answer is known."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_heads import random_heads
from tiny_models import save_tiny_model
from torch import Tensor
from toys import random_sequences

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import origins, units
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def lorsa(model: LanguageModel) -> Lorsa:
    return random_heads(model.site(1))


SEQUENCES = random_sequences(6, 16)
TOKENS = SEQUENCES.tokens.long()


@pytest.fixture(scope="module")
def x(model: LanguageModel) -> Tensor:
    return model.capture(TOKENS, [1])[1][0]


@pytest.fixture(scope="module")
def mean(model: LanguageModel, x: Tensor) -> Tensor:
    return units.mean_head_values(model.site(1), x, SEQUENCES.mask).float()


def test_shares_by_hand(model: LanguageModel, lorsa: Lorsa, x: Tensor, mean: Tensor) -> None:
    site, output = model.site(1), lorsa(x)
    found = origins.mhsa_shares(model, 1, lorsa, mean, SEQUENCES, batch_size=4, progress=False)
    outputs = site.head_outputs(x) - torch.einsum("he,hed->hd", mean, site.W_O)
    parts, tokens, squares = np.zeros((24, 4)), np.zeros(24), np.zeros(24)
    for i, j in SEQUENCES.mask.nonzero().tolist():
        for head, z in zip(output.indices[i, j].tolist(), output.values[i, j].tolist(), strict=True):
            tokens[head] += z > 0
            squares[head] += (z * float(lorsa.W_O[head].norm())) ** 2
            for m in range(4):
                parts[head, m] += z * float(outputs[i, j, m] @ lorsa.W_O[head])
    positive = parts.clip(0)
    alive = (tokens > 0) & (positive.sum(axis=1) > 0)
    assert alive.sum() > 12
    assert np.allclose(found.shares[alive], positive[alive] / positive[alive].sum(axis=1, keepdims=True), atol=1e-4)
    assert np.allclose(found.shares[alive].sum(axis=1), 1)
    assert np.allclose(found.captured[alive], parts.sum(axis=1)[alive] / squares[alive], atol=1e-4)
    assert found.n_active.tolist() == tokens.tolist()
    exchanged = origins.mhsa_shares(model, 1, lorsa, mean, SEQUENCES, exchanged=0, progress=False)
    assert not torch.allclose(exchanged.shares[alive], found.shares[alive], atol=0.1)
    assert torch.equal(exchanged.n_active, found.n_active)


def test_heads_that_write_along_one_mhsa_head_come_from_it(model: LanguageModel, lorsa: Lorsa, mean: Tensor) -> None:
    """Only head 2 of this layer writes anything."""
    alone = load_model(model.name)
    with torch.no_grad():
        weight = alone.attention_module(1).o_proj.weight
        keep = torch.zeros(weight.shape[1], dtype=torch.bool)
        keep[32:48] = True
        weight[:, ~keep] = 0
    found = origins.mhsa_shares(alone, 1, lorsa, mean, SEQUENCES, progress=False)
    alive = ~found.shares.isnan().any(dim=1)
    assert alive.any()
    assert (found.shares[alive][:, 2] == 1).all()
    assert (origins.heads_needed(found.shares[alive], 0.9) == 1).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.floats(0.05, 1))
def test_heads_needed_is_the_smallest_number(weights: list[int], threshold: float) -> None:
    shares = torch.tensor([weights]).double() / sum(weights)
    needed = int(origins.heads_needed(shares, threshold))
    ordered = sorted(shares[0].tolist(), reverse=True)
    assert sum(ordered[:needed]) >= threshold - 1e-6
    assert sum(ordered[: needed - 1]) < threshold
    with pytest.raises(UserError, match="between 0 and 1"):
        origins.heads_needed(shares, 0)


def test_unit_effects(model: LanguageModel, lorsa: Lorsa, x: Tensor, mean: Tensor) -> None:
    found = origins.mhsa_shares(model, 1, lorsa, mean, SEQUENCES, progress=False)
    head = int(found.n_active.argmax())
    table = origins.unit_effects(model, 1, lorsa, head, [0, 3], mean, SEQUENCES, batch_size=4).set_index("removed")
    assert table.index.tolist() == ["MHSA 0", "MHSA 3", "MHSA 0 + 3", "all MHSA heads", "the Lorsa head"]
    written: Any = table["written"]
    assert written["MHSA 0"] + written["MHSA 3"] == pytest.approx(written["MHSA 0 + 3"], rel=1e-3)
    assert (table["n"] == table["n"].iloc[0]).all()
    output = lorsa(x)
    z = (output.values * (output.indices == head)).sum(dim=-1) * lorsa.W_O[head].norm() * SEQUENCES.mask
    followed = torch.cat([SEQUENCES.mask[:, 1:], torch.zeros(6, 1, dtype=torch.bool)], dim=1)
    active = (z > 0) & followed
    assert table["n"].iloc[0] == int(active.sum())
    assert written["the Lorsa head"] == pytest.approx(float(z[active].mean()), rel=1e-4)
    heads = units.LorsaHeads(lorsa)
    losses, _ = model.loss(TOKENS, SEQUENCES.mask)
    with model.splice({1: lambda a, b: b - heads.written(a, b, torch.tensor([head])) * SEQUENCES.mask[..., None]}):
        changed, _ = model.loss(TOKENS, SEQUENCES.mask)
    effect = float((changed - losses)[active[:, :-1]].mean())
    assert table["effect"]["the Lorsa head"] == pytest.approx(effect, abs=1e-4)
    nothing = dataclasses.replace(SEQUENCES, tokens=SEQUENCES.tokens[:0], mask=SEQUENCES.mask[:0])
    with pytest.raises(UserError, match="not active in this text"):
        origins.unit_effects(model, 1, lorsa, head, [0], mean, nothing)


def random_pattern(n: int, length: int, seed: int) -> Tensor:
    scores = torch.randn(n, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)


@given(seed=st.integers(0, 50))
def test_overlap(seed: int) -> None:
    one, counted = random_pattern(3, 7, seed), torch.tensor([False, False, True, True, True, False, True])
    found = origins.overlap(one, one, counted)
    assert torch.allclose(found.diagonal(), torch.ones(3))
    assert torch.allclose(found, found.T)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()
    i, j = torch.eye(7)[None], torch.eye(7).roll(-1, 1)[None]
    assert origins.overlap(i, j, torch.tensor([False] + 6 * [True]))[0, 0] == 0
    one[:, :, 0] += 9
    assert torch.allclose(origins.overlap(one, one[:1], counted), found[:, :1]), "the first token is left out"


def copied_groups(site: AttentionSite) -> Lorsa:
    """Two QK groups for each MHSA head, with its queries and keys."""
    copied = Lorsa(Lorsa.config_for_site(site, 24, 8, 4))
    sources = {"W_Q": site.W_Q, "b_Q": site.b_Q, "W_K": site.expand_kv(site.W_K), "b_K": site.expand_kv(site.b_K)}
    with torch.no_grad():
        for name, source in sources.items():
            getattr(copied, name).copy_(torch.cat([source, source]))
    return copied


def test_a_copied_group_overlaps_with_its_head(model: LanguageModel, x: Tensor) -> None:
    site = model.site(1)
    copied, own = (origins.patterns(part, x[1:2]) for part in (copied_groups(site), site))
    within = origins.overlap(copied, own, SEQUENCES.mask[1])
    assert torch.allclose(within.max(dim=1).values, torch.ones(8), atol=1e-5)
    assert torch.equal(within.argmax(dim=1), torch.arange(8) % 4)


def test_qk_singular_values_are_those_of_the_whole_product(model: LanguageModel, lorsa: Lorsa) -> None:
    for part in (lorsa, model.site(1)):
        W_K = part.W_K if isinstance(part, Lorsa) else part.expand_kv(part.W_K)
        found = origins.qk_singular_values(part)
        assert found.shape == part.W_Q.shape[::2]
        for circuit, (w_q, w_k) in enumerate(zip(part.W_Q.double(), W_K.double(), strict=True)):
            whole = torch.linalg.svdvals(w_q @ w_k.T)
            torch.testing.assert_close(found[circuit], whole[: found.shape[1]])
            assert (whole[found.shape[1] :] < 1e-9).all()


def test_effective_rank_by_hand() -> None:
    ranks = origins.effective_rank(torch.tensor([[3.0, 3.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(ranks, torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
