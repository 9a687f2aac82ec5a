"""The public API: a layer with its replacement, from training to ablation, against the pieces that it stands on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, save_tiny_model

import lorsa_utils as lu
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import LanguageModel
from lorsa_utils.store import CHECKOUT
from lorsa_utils.text import Text

LAYER = 1
WORDS = ["attention", "head", "layer", "of", "the", "model", "reads", "writes", "a", "token"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return lu.load_model(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def text(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Text:
    draws = torch.randint(0, len(WORDS), (40, 120), generator=torch.Generator().manual_seed(0)).tolist()
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(" ".join(WORDS[i] for i in row) + "." for row in draws), encoding="utf-8")
    return lu.load_text(model, 2000, [file], held_out_tokens=500, context=32)


@pytest.fixture(scope="module")
def layer(model: LanguageModel, text: Text, tmp_path_factory: pytest.TempPathFactory) -> lu.Layer:
    return lu.train(model, LAYER, text.train, tmp_path_factory.mktemp("runs") / "lorsa", n_heads=32, n_qk=4, k=4)


def test_a_trained_layer_is_loaded_again_with_its_own_model(layer: lu.Layer) -> None:
    again = lu.Layer.from_pretrained(layer.folder)
    assert again.model is layer.model, "a model that is in memory is shared"
    assert again.number == LAYER
    tokens = random_tokens(2, 20)
    assert torch.equal(again.activations(tokens), layer.activations(tokens))
    assert lu.Layer.from_pretrained(layer.folder, model=layer.model).model is layer.model


def test_another_model_is_refused(layer: lu.Layer, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    for given in (str(other), lu.load_model(other)):
        with pytest.raises(UserError, match="is not the model that"):
            lu.Layer.from_pretrained(layer.folder, model=given)


def test_a_folder_that_is_no_finished_run_is_refused(layer: lu.Layer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        lu.Layer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((layer.folder / "config.json").read_text())
    with pytest.raises(UserError, match="unfinished run"):
        lu.Layer.from_pretrained(tmp_path)


def test_activations_are_those_of_the_module(layer: lu.Layer) -> None:
    tokens = random_tokens(2, 20)
    x, _ = layer.model.capture(tokens, [LAYER])[LAYER]
    output = layer.module(x)
    activations = layer.activations(tokens)
    assert activations.shape == (2, 20, 32)
    written = activations @ layer.module.W_O + layer.module.b_O
    assert torch.allclose(layer.module.decode(output.indices, output.values), written, atol=1e-5)
    assert int((activations != 0).sum(dim=-1).max()) <= 4


def test_ablating_takes_away_what_the_heads_write_and_nothing_else(layer: lu.Layer) -> None:
    tokens, heads = random_tokens(2, 20), [3, 17]
    plain = layer.model.logits(tokens)
    written = layer.activations(tokens)[..., heads] @ layer.module.W_O[heads]
    with layer.model.splice({LAYER: lambda x, y: y - written}):
        expected = layer.model.logits(tokens)
    with layer.ablate(heads):
        assert torch.allclose(layer.model.logits(tokens), expected, atol=1e-4)
    with layer.ablate([]):
        assert torch.equal(layer.model.logits(tokens), plain)
    assert torch.equal(layer.model.logits(tokens), plain)
    with pytest.raises(UserError, match="no unit 32"), layer.ablate([32]):
        pass


def test_evaluation_is_that_of_the_metrics(layer: lu.Layer, text: Text) -> None:
    result = layer.evaluate(text.held_out)
    assert result == lu.evaluate(layer.module, LAYER, layer.model, text.held_out)
    assert 0 < result["fvu"] < 1


def test_the_own_text_of_a_layer_is_what_it_was_not_trained_on(layer: lu.Layer, text: Text) -> None:
    own = layer.text(500)
    assert torch.equal(own.tokens, text.held_out.tokens)
    assert not {document.id for document in own.documents} & {document.id for document in text.train.documents}


def test_a_head_is_described_and_shown(layer: lu.Layer, tmp_path: Path) -> None:
    table = layer.describe(layer.text(500), scale=0.05, removed=0, progress=False)
    assert table["head"].tolist() == list(range(32))
    head = int(table["frequency"].idxmax())
    page = layer.show(head, layer.text(500), table=table, progress=False)
    assert f"Head {head}" in page.save(tmp_path / "head.html").read_text(encoding="utf-8")
    assert page._repr_html_().startswith("<iframe srcdoc=")


def test_what_is_not_a_lorsa_has_no_heads(model: LanguageModel, text: Text, tmp_path: Path) -> None:
    sae = lu.train(model, LAYER, text.train, tmp_path / "sae", kind="sae", n_heads=32, k=4)
    assert sae.activations(random_tokens(1, 8)).shape == (1, 8, 32)
    with pytest.raises(UserError, match="is a sae; give a Lorsa"):
        sae.show(0)


@pytest.mark.slow
def test_the_script_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(import lorsa_utils as lu\n.*?)```", readme, re.DOTALL)
    (tmp_path / "data").symlink_to(CHECKOUT / "data")
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "LORSA_DATA": str(CHECKOUT / "data")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    fvu, *_ = map(float, re.findall(r"^[0-9.]+$", run.stdout, re.MULTILINE))
    assert 0.1 < fvu < 0.9
