"""The language keeps its rules, sparse modules take the layers' places, weights are what the modules compute."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from definitions import definitions
from torch import Tensor

from lorsa_utils.models import LanguageModel
from lorsa_utils.toys import sparse_transformer
from lorsa_utils.toys.sparse_transformer import RULES, Language, SparseToyConfig, SparseTransformer

SMALL = SparseToyConfig(
    n_letters=6, n_series=4, n_keys=2, block=4, length=16, d_model=32, n_heads=2, d_mlp=32, steps=12, batch_size=8,
    n_lorsa_heads=32, n_qk_heads=4, n_features=32, sparse_steps=8,
)  # fmt: skip
NOTEBOOK = definitions("14_sparse_transformer")


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(SMALL)


@pytest.fixture(scope="module")
def model(language: Language) -> LanguageModel:
    return NOTEBOOK.train_transformer(language, 0)


@pytest.fixture(scope="module")
def sparse(model: LanguageModel, language: Language) -> SparseTransformer:
    return NOTEBOOK.make_sparse(model, language, 0)


@pytest.fixture(scope="module")
def tokens(language: Language) -> Tensor:
    return language.sample(3, torch.Generator().manual_seed(1)).tokens


def test_rules_hold_where_they_are_told(language: Language) -> None:
    sample = language.sample(50, torch.Generator().manual_seed(3))
    series, keys, answers = (side.tolist() for side in (language.series, language.keys, language.answers))
    for tokens, rules in zip(sample.tokens.tolist(), sample.rule.tolist(), strict=True):
        for (token, after), rule in zip(itertools.pairwise(tokens), rules, strict=False):
            if RULES[rule] == "successor":
                assert series.index(after) == (series.index(token) + 1) % len(series)
            elif RULES[rule] == "skip-bigram":
                assert token == language.question
                assert answers.index(after) == keys.index(tokens[1])
            elif RULES[rule] == "induction":
                assert tokens[tokens.index(token) + 1] == after
    assert sample.rule.unique().tolist() == list(range(len(RULES)))
    assert len(set(language.names)) == SMALL.n_tokens


def test_training_learns(model: LanguageModel, language: Language) -> None:
    losses = NOTEBOOK.rule_losses(model, language.sample(64, torch.Generator().manual_seed(9)))
    assert losses["all"] < math.log(SMALL.n_tokens)
    assert set(losses) == {"all", *RULES}


def test_layers_are_read_where_they_are(model: LanguageModel, tokens: Tensor) -> None:
    batch = sparse_transformer.read_layers(model, tokens)
    assert set(batch.inputs) == {0, 1, 2, 3}
    for layer, (x, y) in model.capture(tokens, [0, 1]).items():
        assert torch.equal(batch.inputs[layer], x)
        assert torch.equal(batch.outputs[layer], y)
        mlp = model.model.model.layers[layer].mlp
        assert torch.allclose(mlp(batch.inputs[2 + layer]), batch.outputs[2 + layer], atol=1e-6)


@torch.no_grad()
def test_sparse_model_runs_on_its_modules_alone(sparse: SparseTransformer, tokens: Tensor) -> None:
    model, llama = sparse.model, sparse.model.model.model
    stream = llama.embed_tokens(tokens)
    for layer in (0, 1):
        stream = stream + sparse.modules[layer](llama.layers[layer].input_layernorm(stream)).y
        stream = stream + sparse.modules[2 + layer](llama.layers[layer].post_attention_layernorm(stream)).y
    expected, untouched = model.model.lm_head(llama.norm(stream)), model.logits(tokens)
    with sparse.installed():
        assert torch.allclose(model.logits(tokens), expected, atol=1e-4)
    assert torch.equal(model.logits(tokens), untouched), "nothing is left behind"
    every = torch.arange(SMALL.n_lorsa_heads)
    with sparse.installed({("attention", 0): every, ("attention", 1): every}):
        cut = model.logits(tokens)
    assert not torch.allclose(cut, expected, atol=1e-2)
    assert torch.allclose(cut[:, 0], cut[:1, 0].expand(3, -1), atol=1e-5), "BOS alone decides at BOS"
    assert {module.k for module in sparse.modules} == {8}


@torch.no_grad()
def test_saved_and_loaded(sparse: SparseTransformer, tokens: Tensor, tmp_path: Path) -> None:
    sparse.save(tmp_path)
    again = SparseTransformer.load(tmp_path)
    with sparse.installed(), again.installed():
        assert torch.allclose(*(toy.model.logits(tokens) for toy in (sparse, again)), atol=1e-5)


@torch.no_grad()
def test_weights_of_notebook_14_are_what_the_modules_compute(
    sparse: SparseTransformer, language: Language, tokens: Tensor
) -> None:
    gains, lorsa, llama = NOTEBOOK.mean_gains(sparse, tokens), sparse.modules[1], sparse.model.model.model
    with sparse.installed():
        stream = sparse.model.residual(tokens, 1)
    norm = llama.layers[1].input_layernorm
    scale = (stream.square().mean(dim=-1) + norm.variance_epsilon).rsqrt().mean()
    assert torch.allclose(gains[1], norm.weight * scale, atol=1e-4)
    written = llama.embed_tokens.weight[language.letters]
    read = written * gains[1]
    assert torch.allclose(NOTEBOOK.moves(lorsa, gains[1], written), read @ lorsa.W_V.T, atol=1e-5)
    raised = NOTEBOOK.raises(sparse.model.model.lm_head.weight, gains["end"], written)
    assert torch.allclose(raised.mean(dim=1), torch.zeros(len(written)), atol=1e-4)
    # A score at one distance is the module's own score of two tokens that far apart, without their biases.
    lorsa.b_Q.zero_()
    lorsa.b_K.zero_()
    x = torch.zeros(1, 6, SMALL.d_model)
    x[0, 5], x[0, 2] = read[0], read[1]
    q, k = lorsa.queries_keys(x)
    for group in range(SMALL.n_qk_heads):
        own = float(q[0, group, 5] @ k[0, group, 2]) * lorsa.attn_scale
        score = NOTEBOOK.wants(lorsa, gains[1], group, written[:1], written[1:2], range(3, 4))
        assert float(score) == pytest.approx(own, abs=1e-4)
