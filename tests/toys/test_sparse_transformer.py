"""The language keeps its rules, sparse modules take the layers' places, weights are what the modules compute, circuits can be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorsa_utils.models import LanguageModel
from lorsa_utils.toys import sparse_transformer
from lorsa_utils.toys.sparse_transformer import RULES, Language, SparseToyConfig, SparseTransformer

SMALL = SparseToyConfig(
    n_letters=6, n_series=4, n_keys=2, block=4, length=16, d_model=32, n_heads=2, d_mlp=32, steps=30, batch_size=16,
    n_lorsa_heads=32, n_qk_heads=4, n_features=32, sparse_steps=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(SMALL)


@pytest.fixture(scope="module")
def model(language: Language) -> LanguageModel:
    return sparse_transformer.train_transformer(language)


@pytest.fixture(scope="module")
def sparse(model: LanguageModel, language: Language) -> SparseTransformer:
    return sparse_transformer.make_sparse(model, language)


def test_rules_hold_where_they_are_told(language: Language) -> None:
    sample = language.sample(50, torch.Generator().manual_seed(3))
    seen = set()
    for tokens, rules in zip(sample.tokens.tolist(), sample.rule.tolist(), strict=True):
        for i, rule in enumerate(rules[:-1]):
            token, after = tokens[i], tokens[i + 1]
            seen.add(RULES[rule])
            if RULES[rule] == "successor":
                series = language.series.tolist()
                assert series.index(after) == (series.index(token) + 1) % len(series)
            elif RULES[rule] == "skip-bigram":
                assert token == language.question
                assert language.answers.tolist().index(after) == language.keys.tolist().index(tokens[1])
            elif RULES[rule] == "induction":
                assert tokens[tokens.index(token) + 1] == after
    assert seen == set(RULES)
    names = [language.name(token) for token in range(SMALL.n_tokens)]
    assert len(set(names)) == SMALL.n_tokens


def test_training_learns(model: LanguageModel, language: Language) -> None:
    losses = sparse_transformer.rule_losses(model, language.sample(64, torch.Generator().manual_seed(9)))
    assert losses["all"] < torch.tensor(SMALL.n_tokens).log().item()
    assert set(losses) == {"all", *RULES}


def test_layers_are_read_where_they_are(model: LanguageModel, language: Language) -> None:
    tokens = language.sample(3, torch.Generator().manual_seed(1)).tokens
    batch = sparse_transformer.read_layers(model, tokens)
    assert set(batch.inputs) == {0, 1, 2, 3}
    for layer, (x, y) in model.capture(tokens, [0, 1]).items():
        assert torch.equal(batch.inputs[layer], x)
        assert torch.equal(batch.outputs[layer], y)
        mlp = model.model.model.layers[layer].mlp
        assert torch.allclose(mlp(batch.inputs[2 + layer]), batch.outputs[2 + layer], atol=1e-6)


def test_sparse_model_runs_on_its_modules_alone(sparse: SparseTransformer, language: Language) -> None:
    model, tokens = sparse.model, language.sample(3, torch.Generator().manual_seed(2)).tokens
    layers = model.model.model.layers
    with torch.no_grad():
        stream = model.model.model.embed_tokens(tokens)
        for layer in (0, 1):
            stream = stream + sparse.lorsas[layer](layers[layer].input_layernorm(stream)).y
            stream = stream + sparse.transcoders[layer](layers[layer].post_attention_layernorm(stream)).y
        wanted = model.model.lm_head(model.model.model.norm(stream))
        untouched = model.logits(tokens)
        with sparse.installed():
            assert torch.allclose(model.logits(tokens), wanted, atol=1e-4)
        assert torch.equal(model.logits(tokens), untouched), "nothing is left behind"
        every = torch.arange(SMALL.n_lorsa_heads)
        with sparse.installed({("attention", 0): every, ("attention", 1): every}):
            cut = model.logits(tokens)
        assert not torch.allclose(cut, wanted, atol=1e-2)
        assert torch.allclose(cut[:, 0], cut[:1, 0].expand(3, -1), atol=1e-5), (
            "without attention, BOS alone decides at BOS"
        )
    for module in (*sparse.lorsas, *sparse.transcoders):
        assert module.k == 8


def test_saved_and_loaded(sparse: SparseTransformer, language: Language, tmp_path: Path) -> None:
    sparse.save(tmp_path)
    again = SparseTransformer.load(tmp_path)
    tokens = language.sample(2, torch.Generator().manual_seed(4)).tokens
    with torch.no_grad(), sparse.installed(), again.installed():
        assert torch.allclose(sparse.model.logits(tokens), again.model.logits(tokens), atol=1e-5)


def test_weights_are_what_the_modules_compute(sparse: SparseTransformer, language: Language) -> None:
    weights = sparse_transformer.Weights(sparse, language)
    write = weights.embedding[language.letters]
    gain = sparse.model.model.model.layers[1].input_layernorm.weight
    scale = float((weights.scale["model.layers.1.input_layernorm"] / gain).mean())
    read = write * gain * scale
    assert torch.allclose(weights.values(1, write), read @ sparse.lorsas[1].W_V.T, atol=1e-5)
    # A score at one distance is the module's own score of two tokens that far apart, without their biases.
    lorsa = sparse.lorsas[1]
    with torch.no_grad():
        lorsa.b_Q.zero_()
        lorsa.b_K.zero_()
        x = torch.zeros(1, 6, SMALL.d_model)
        x[0, 5], x[0, 2] = read[0], read[1]
        q, k = lorsa.queries_keys(x)
        for group in range(SMALL.n_qk_heads):
            own = float(q[0, group, 5] @ k[0, group, 2]) * lorsa.attn_scale
            assert float(weights.wants(1, group, write[:1], write[1:2], range(3, 4))) == pytest.approx(own, abs=1e-4)
    assert torch.allclose(weights.logits(write).mean(dim=1), torch.zeros(len(write)), atol=1e-4)


def test_cut_table_has_every_model(sparse: SparseTransformer, language: Language) -> None:
    circuit = sparse_transformer.InductionCircuit({1: [3, 4]}, {1: [7]}, [0], sparse_transformer.pd.DataFrame())
    sample = language.sample(20, torch.Generator().manual_seed(5))
    table = sparse_transformer.cut_table(sparse, circuit, sample).set_index("model")
    assert list(table.index) == [
        "original", "sparse", "circuit cut", "first layer's heads cut", "second layer's heads cut", "random heads cut",
    ]  # fmt: skip
    assert table.loc["circuit cut", "heads"] == 3
    assert table.loc["random heads cut", "heads"] <= 3
    assert table.loc["original", "all"] == pytest.approx(sparse_transformer.rule_losses(sparse.model, sample)["all"])
