"""The toy of notebook 00: its units against hand-made layers and scores whose answers are known."""

from typing import Any

import pytest
import torch
from definitions import definitions

TOY = definitions("00_attention_superposition")
SIZES = TOY.Toy()


@pytest.fixture(scope="module")
def language() -> Any:
    return TOY.Language(SIZES, 3)


@pytest.fixture(scope="module")
def batch(language: Any) -> Any:
    return language.sample(300, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def site(language: Any) -> Any:
    """Head h serves the units of the h-th token a: it looks for their tokens b and writes their directions."""
    site = TOY.random_attention(SIZES, torch.Generator().manual_seed(0))
    for weights in (site.W_Q, site.W_K, site.W_V, site.W_O):
        weights.zero_()
    found = language.embeddings / SIZES.d_model  # x . e / d_model is 1 for the token itself and 0 for every other
    for head in range(SIZES.n_heads):
        site.W_Q[head, :, 0] = 300 * found[1 + head]
        for slot, unit in enumerate((language.queries == 1 + head).nonzero()[:, 0].tolist()):
            site.W_K[head, :, 0] += found[language.keys[unit]]
            site.W_V[head, :, slot] = found[language.keys[unit]]
            site.W_O[head, slot] = language.write[unit]
    # Queries that find nothing look at BOS, whose value is 0: a constant query along a second dimension.
    site.W_Q[:, :, 1] = 300 * found.sum(dim=0)
    site.W_K[:, :, 1] = 0.5 * found[0]
    return site


def test_units_are_active_where_their_tokens_stand_and_nowhere_else(language: Any, batch: Any) -> None:
    assert (batch.tokens[:, 0] == 0).all()
    assert not batch.mask[:, 0].any()
    for row, position, unit in ((r, p, u) for r in range(20) for p in range(SIZES.length) for u in range(12)):
        tokens = batch.tokens[row].tolist()
        expected = tokens[position] == language.queries[unit] and int(language.keys[unit]) in tokens[:position]
        assert bool(batch.active[row, position, unit]) == expected
    gram = language.embeddings @ language.embeddings.T
    torch.testing.assert_close(gram, SIZES.d_model * torch.eye(17), atol=1e-4, rtol=0)
    assert len(set(language.units)) == SIZES.n_units > SIZES.n_heads


def test_a_hand_made_layer_is_read_rightly(language: Any, batch: Any, site: Any) -> None:
    shares = TOY.unit_shares(language, TOY.head_parts(site, batch))
    assert shares.argmax(dim=1).tolist() == (language.queries - 1).tolist()
    assert TOY.effective_number(shares).max() < 1.01
    assert TOY.fvu(TOY.output(site, batch.x)[batch.mask], batch.y[batch.mask]) < 0.2
    third = torch.zeros(len(batch.tokens), 1, SIZES.n_heads, 1)
    third[:, :, 2] = 1
    torch.testing.assert_close(TOY.output(site, batch.x, third), site.head_outputs(batch.x)[:, :, 2])


def test_effective_number_and_fvu() -> None:
    shares = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0]])
    assert TOY.effective_number(shares).tolist() == [1, 4, 2, 2]
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert TOY.fvu(y, y) == 0
    assert TOY.fvu(y.mean(dim=0).expand_as(y), y) == pytest.approx(1)


def test_scores_of_the_truth_of_the_wrong_time_and_of_silence(language: Any, batch: Any) -> None:
    active, order = batch.active[batch.mask], torch.randperm(SIZES.n_units, generator=torch.Generator().manual_seed(0))
    truth = TOY.recovery(language, TOY.Candidates(language.write[order], 3 * active[:, order]), batch)
    assert order[torch.tensor(truth["match"])].tolist() == list(range(SIZES.n_units))
    assert truth[["cosine", "correlation"]].min().min() == pytest.approx(1, abs=1e-5)
    late = TOY.recovery(language, TOY.Candidates(language.write, active.roll(57, dims=0)), batch)
    assert late["cosine"].min() > 0.99
    assert late["correlation"].abs().max() < 0.15
    silent = TOY.recovery(language, TOY.Candidates(language.write, torch.zeros_like(active)), batch)
    assert (silent["correlation"] == 0).all()


def test_principal_directions_of_a_head_explain_it_with_both_signs(batch: Any, site: Any) -> None:
    candidates = TOY.mhsa_heads(site, batch, per_head=3)
    first, outputs = candidates.directions[:3], site.head_outputs(batch.x)[batch.mask][:, 0]
    torch.testing.assert_close(first @ first.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(candidates.directions[3 * SIZES.n_heads :], -candidates.directions[: 3 * SIZES.n_heads])
    explained = candidates.activations[:, :3] @ first
    torch.testing.assert_close(explained, outputs - outputs.mean(dim=0), atol=1e-4, rtol=0)


def test_same_seed_same_lorsa() -> None:
    language = TOY.Language(TOY.Toy(steps=3), 1)
    first, again, other = (TOY.train_lorsa(language, TOY.train_attention(language, 1), seed) for seed in (1, 1, 2))
    assert torch.equal(first.W_O, again.W_O)
    assert not torch.equal(first.W_O, other.W_O)
