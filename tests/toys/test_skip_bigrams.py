"""The toy with known units: its language against hand-made sentences, its scores against known answers, and that units are found."""

import pandas as pd
import pytest
import torch

from lorsa_utils.config import RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import AttentionSite
from lorsa_utils.toys import skip_bigrams
from lorsa_utils.view import figures

CONFIG = skip_bigrams.ToyConfig()


@pytest.fixture(scope="module")
def language() -> skip_bigrams.Language:
    return skip_bigrams.make_language(CONFIG, seed=3)


@pytest.fixture(scope="module")
def sample(language: skip_bigrams.Language) -> skip_bigrams.Sample:
    return language.sample(300, torch.Generator().manual_seed(0))


def hand_made_site(language: skip_bigrams.Language) -> AttentionSite:
    """Head h serves the units of the h-th token a: it looks for their tokens b and writes their directions."""
    config = language.config
    W_Q, W_K, W_V = (torch.zeros(config.n_heads, config.d_model, config.d_head) for _ in range(3))
    W_O = torch.zeros(config.n_heads, config.d_head, config.d_model)
    unit_embeddings = (
        language.embeddings / config.d_model
    )  # x . e / d_model is 1 for the token itself and 0 for every other
    for head in range(config.n_heads):
        W_Q[head, :, 0] = 100 * unit_embeddings[1 + head]
        for slot, unit in enumerate((language.queries == 1 + head).nonzero()[:, 0].tolist()):
            W_K[head, :, 0] += unit_embeddings[language.keys[unit]]
            W_V[head, :, slot] = unit_embeddings[language.keys[unit]]
            W_O[head, slot] = language.write[unit]
    # Queries that find nothing look at BOS, whose value is 0: a constant query along a second dimension.
    W_Q[:, :, 1] = 100 * unit_embeddings.sum(dim=0)
    W_K[:, :, 1] = 0.5 * unit_embeddings[skip_bigrams.BOS]
    zeros = torch.zeros(config.n_heads, config.d_head)
    return AttentionSite(
        0,
        "toy",
        1.0,
        RotaryConfig(),
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=W_O,
        b_Q=zeros,
        b_K=zeros,
        b_V=zeros,
        b_O=torch.zeros(config.d_model),
    )


class TestLanguage:
    def test_units_are_active_where_b_stood_before_a(self, language: skip_bigrams.Language) -> None:
        a, b = int(language.queries[5]), int(language.keys[5])
        other = 1 + a % CONFIG.n_queries
        batch = language.read(torch.tensor([[skip_bigrams.BOS, a, b, other, a, a]]))
        assert batch.active[0, :, 5].tolist() == [0, 0, 0, 0, 1, 1]
        assert batch.active.sum() == 2
        assert batch.mask.tolist() == [[False, True, True, True, True, True]]

    def test_samples_start_with_bos_and_agree_with_a_loop(self, language: skip_bigrams.Language) -> None:
        batch = language.sample(20, torch.Generator().manual_seed(1))
        assert (batch.tokens[:, 0] == skip_bigrams.BOS).all()
        assert (batch.tokens[:, 1:] != skip_bigrams.BOS).all()
        for row, tokens in enumerate(batch.tokens.tolist()):
            for position, token in enumerate(tokens):
                for unit in range(CONFIG.n_units):
                    expected = token == language.queries[unit] and int(language.keys[unit]) in tokens[:position]
                    assert bool(batch.active[row, position, unit]) == expected

    def test_embeddings_are_orthogonal_and_directions_have_norm_one(self, language: skip_bigrams.Language) -> None:
        gram = language.embeddings @ language.embeddings.T
        torch.testing.assert_close(gram, CONFIG.d_model * torch.eye(CONFIG.n_tokens), atol=1e-4, rtol=0)
        torch.testing.assert_close(language.write.norm(dim=1), torch.ones(CONFIG.n_units))

    def test_units_outnumber_heads_and_have_names(self, language: skip_bigrams.Language) -> None:
        assert CONFIG.n_units > CONFIG.n_heads
        names = [language.unit_name(unit) for unit in range(CONFIG.n_units)]
        assert len(set(names)) == CONFIG.n_units
        assert names[0] == "b1 … a1"

    @pytest.mark.parametrize(
        ("changes", "word"),
        [({"n_queries": 5}, "multiple"), ({"d_model": 16}, "orthogonal"), ({"head_dropout": 1.0}, "head_dropout")],
    )
    def test_impossible_settings_are_refused(self, changes: dict[str, float], word: str) -> None:
        with pytest.raises(UserError, match=word):
            CONFIG.replace(**changes)


class TestScores:
    def test_effective_number(self) -> None:
        shares = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0]])
        assert skip_bigrams.effective_number(shares).tolist() == [1, 4, 2, 2]

    def test_the_truth_scores_one(self, language: skip_bigrams.Language, sample: skip_bigrams.Sample) -> None:
        shuffled = torch.randperm(CONFIG.n_units, generator=torch.Generator().manual_seed(0))
        truth = skip_bigrams.Candidates(language.write[shuffled], 3 * sample.active[sample.mask][:, shuffled])
        table = skip_bigrams.recovery(language, truth, sample)
        assert shuffled[torch.tensor(table["match"])].tolist() == list(range(CONFIG.n_units))
        assert table["cosine"].min() == pytest.approx(1, abs=1e-5)
        assert table["correlation"].min() == pytest.approx(1, abs=1e-5)

    def test_right_direction_at_the_wrong_time_has_no_correlation(
        self, language: skip_bigrams.Language, sample: skip_bigrams.Sample
    ) -> None:
        active = sample.active[sample.mask]
        table = skip_bigrams.recovery(
            language, skip_bigrams.Candidates(language.write, active.roll(57, dims=0)), sample
        )
        assert table["cosine"].min() > 0.99
        assert table["correlation"].abs().max() < 0.15
        silent = skip_bigrams.recovery(
            language, skip_bigrams.Candidates(language.write, torch.zeros_like(active)), sample
        )
        assert (silent["correlation"] == 0).all()

    def test_random_directions_score_low_and_count_both_ways(
        self, language: skip_bigrams.Language, sample: skip_bigrams.Sample
    ) -> None:
        candidates = skip_bigrams.random_directions(hand_made_site(language), sample, 32, seed=0)
        assert candidates.directions.shape == (64, CONFIG.d_model)
        assert 0.2 < skip_bigrams.recovery(language, candidates, sample)["cosine"].mean() < 0.55
        flipped = skip_bigrams.Candidates(
            candidates.directions.roll(32, dims=0), candidates.activations.roll(32, dims=1)
        )
        assert (
            skip_bigrams.recovery(language, flipped, sample)["cosine"].tolist()
            == skip_bigrams.recovery(language, candidates, sample)["cosine"].tolist()
        )

    def test_a_hand_made_layer_is_read_rightly(
        self, language: skip_bigrams.Language, sample: skip_bigrams.Sample
    ) -> None:
        site = hand_made_site(language)
        shares = skip_bigrams.unit_shares(language, skip_bigrams.head_parts(site, sample))
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(CONFIG.n_units))
        assert shares.argmax(dim=1).tolist() == (language.queries - 1).tolist()
        assert skip_bigrams.effective_number(shares).max() < 1.01
        assert (
            skip_bigrams.fvu(
                skip_bigrams.output(site, sample.x)[sample.mask], language.target(sample.active)[sample.mask]
            )
            < 0.2
        )

    def test_principal_directions_of_a_head_are_orthonormal_and_explain_it(
        self, language: skip_bigrams.Language, sample: skip_bigrams.Sample
    ) -> None:
        site = hand_made_site(language)
        found = skip_bigrams.mhsa_heads(site, sample, per_head=3)
        n = 3 * CONFIG.n_heads
        first = found.directions[:3]
        torch.testing.assert_close(first @ first.T, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.directions[n:], -found.directions[:n])
        outputs = site.head_outputs(sample.x)[sample.mask][:, 0]
        torch.testing.assert_close(found.activations[:, :3] @ first, outputs - outputs.mean(dim=0), atol=1e-4, rtol=0)

    def test_fvu_of_mean_and_of_truth(self) -> None:
        y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        assert skip_bigrams.fvu(y, y) == 0
        assert skip_bigrams.fvu(y.mean(dim=0).expand_as(y), y) == pytest.approx(1)


class TestTraining:
    def test_head_weights_scale_heads(self, language: skip_bigrams.Language, sample: skip_bigrams.Sample) -> None:
        site = hand_made_site(language)
        keep = torch.zeros(len(sample.tokens), 1, CONFIG.n_heads, 1)
        keep[:, :, 2] = 1
        torch.testing.assert_close(skip_bigrams.output(site, sample.x, keep), site.head_outputs(sample.x)[:, :, 2])

    def test_same_seed_same_result(self) -> None:
        config = CONFIG.replace(attention_steps=3, lorsa_steps=3)
        language = skip_bigrams.make_language(config, 1)
        one, two = (skip_bigrams.train_lorsa(language, skip_bigrams.train_attention(language, 1), 1) for _ in range(2))
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name])
        assert not torch.equal(
            one.W_O, skip_bigrams.train_lorsa(language, skip_bigrams.train_attention(language, 1), 2).W_O
        )

    @pytest.mark.slow
    def test_lorsa_finds_the_units_and_mhsa_heads_do_not_over_five_seeds(self) -> None:
        tables = [skip_bigrams.run_experiment(CONFIG, seed, n_test=300).recovery for seed in range(5)]
        cosine = [table.groupby("candidates")["cosine"].mean() for table in tables]
        lorsa = torch.tensor([float(each["Lorsa heads"]) for each in cosine])
        assert lorsa.mean() >= 0.95
        for baseline, most in (
            ("MHSA heads", 0.75),
            ("MHSA components", 0.9),
            ("Lorsa before training", 0.75),
            ("random", 0.5),
        ):
            scores = torch.tensor([float(each[baseline]) for each in cosine])
            assert scores.max() < most
            assert (lorsa - scores).min() > 0.05


class TestFigures:
    def test_maps_hold_the_numbers_they_are_given(
        self, language: skip_bigrams.Language, sample: skip_bigrams.Sample
    ) -> None:
        names = [language.unit_name(unit) for unit in range(CONFIG.n_units)]
        shares = skip_bigrams.unit_shares(language, skip_bigrams.head_parts(hand_made_site(language), sample))
        data = figures.figure_data(figures.toy_shares(shares, names))
        assert data["z"].to_numpy() == pytest.approx(shares.flatten().numpy())
        assert data["y"].tolist() == [name for name in names for _ in range(CONFIG.n_heads)]
        cosines = figures.toy_cosines({"two": torch.eye(12)[:, :2], "all": torch.eye(12)}, names)
        assert [trace.z.shape for trace in cosines.data] == [(12, 2), (12, 12)]
        activity = figures.toy_activity(torch.eye(12), torch.zeros(12, 12), ["a1"] * 12, names)
        assert [trace.x[0] for trace in activity.data] == ["1 a1", "1 a1"]

    def test_recovery_shows_means_over_units_and_seeds(self) -> None:
        rows = [("Lorsa", seed, 0.9 + 0.1 * seed + shift, 0.5) for seed in (0, 1) for shift in (-0.1, 0.1)]
        data = pd.DataFrame(rows, columns=["candidates", "seed", "cosine", "correlation"])
        bar, points, *_ = figures.toy_recovery(data).data
        assert list(bar.x) == pytest.approx([0.95])
        assert list(points.x) == pytest.approx([0.9, 1.0])

    def test_table_shows_every_cell(self) -> None:
        table = figures.toy_table(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), "T")
        assert [list(column) for column in table.data[0].cells.values] == [["1", "2"], ["x", "y"]]
