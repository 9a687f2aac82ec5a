"""Presets train as everything else does, cost what arithmetic says, and a model out of reach leaves a banner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from calling import lorsa
from tiny_models import save_tiny_model

from lorsa_utils import config, models, store
from lorsa_utils.activations import ActivationCache
from lorsa_utils.config import PRESETS
from lorsa_utils.corpus import Corpus, Document
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import doctor, notebook, recipes
from lorsa_utils.kit.bench import SHAPES, Shape
from lorsa_utils.lorsa import load
from lorsa_utils.view import gallery

KINDS = {"pythia-160m": "gpt_neox", "llama-3.1-8b": "llama", "qwen3-1.7b": "qwen3"}
TINY: dict[str, Any] = {"n_heads": 96, "n_qk": 8, "k": 4, "context": 32, "train_tokens": 600, "batch_size": 4}
TINY |= {"layer": 1, "layers": (0, 1)}
PROSE = [
    Document(f"doc {i}", "prose", f"Paragraph {i}: attention reads many tokens and writes a few, {i * i}. " * 4)
    for i in range(40)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_model(tmp_path_factory.mktemp(kind) / "model", kind) for name, kind in KINDS.items()}


@pytest.fixture
def tiny(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, config.Preset]:
    """The presets, each with a tiny model of its architecture and tiny sizes."""
    small = {name: PRESETS[name].replace(model=str(folder), **TINY) for name, folder in folders.items()}
    for name, preset in small.items():
        monkeypatch.setitem(PRESETS, name, preset)
        profile = preset.replace(cache_tokens=2000, held_out_tokens=400, compare_held_out_tokens=400)
        monkeypatch.setitem(config.PROFILES, name, profile)
    corpus = Corpus(PROSE[:32], PROSE[32:], {})

    def load_corpus(files: Any = None, dataset: str | None = None, **options: Any) -> Corpus:
        return replace(corpus, origin=list(files) if files else dataset or "embedded")

    monkeypatch.setattr("lorsa_utils.text.load_corpus", load_corpus)
    return small


# ---- shapes


def shape_of(preset: config.Preset) -> Shape:
    return doctor.shape(preset, preset.d_model, preset.d_head)


def test_shapes_are_those_that_are_timed() -> None:
    assert shape_of(PRESETS["pythia-160m"]) == SHAPES["pythia"]
    assert shape_of(PRESETS["llama-3.1-8b"]) == SHAPES["llama"]
    assert SHAPES["pythia"].config().n_parameters == 18 * 2**20
    assert SHAPES["llama"].config().n_parameters == 512 * 2**20


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_ratios_are_the_papers(preset: config.Preset) -> None:
    assert preset.n_heads == 8 * preset.d_model
    assert preset.n_heads // preset.n_qk == preset.d_head
    assert preset.parameters > preset.multiplied > 0
    assert preset.train_tokens == 800_000_000
    assert max(preset.layers) < preset.n_layers


# ---- costs


def test_operations_and_bytes_by_hand() -> None:
    preset = PRESETS["pythia-160m"].replace(
        d_model=4, n_heads=6, n_qk=2, d_head=2, k=1, context=3, batch_size=1, train_tokens=3600, n_layers=5
    )
    preset = preset.replace(parameters=100.0, multiplied=50.0)
    weights = 2 * 4 * 2 * 2 + 2 * 4 * 6  # W_Q and W_K of two groups, W_V and W_O of six heads
    assert shape_of(preset).config().n_parameters == weights
    # Projections and their weights' gradients over 3 tokens: 2 * 2 operations per weight of W_Q, W_K, W_V; attention
    # forward over 6 causal pairs in 2 groups, backward in one of them (one head is kept); decode and its two gradients
    # read one row per token.
    projections = 2 * 2 * 3 * 4 * (2 * 2 * 2 + 6)
    attention = 2 * (2 + 3) * 6 * 2 + 2 * (3 * 2 + 2 * 3) * 6
    decode = 3 * 2 * 3 * 1 * 4
    assert doctor.step_flops(shape_of(preset)) == pytest.approx((projections + attention + decode) / 3)
    found = doctor.estimate(preset, rate=1.0, memory=200 + 16 * 1 * 3 * 6 + 2 * 16 * weights)
    assert found["layers_together"] == 2
    assert found["hours_training"] == pytest.approx(5 * (projections + attention + decode) / 3, abs=0.01)
    assert found["hours_model"] == 3 * 2 * 50  # three groups of layers, a pass each
    assert found["hours"] == pytest.approx(found["hours_training"] + found["hours_model"], abs=0.01)


def test_readme_prints_what_doctor_computes() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        line = next(row for row in readme.splitlines() if row.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = doctor.estimate(preset)
        shown = (found["mflop_per_token_and_layer"], found["model_gflop_per_token"], found["layers_together"])
        assert [float(cell.split()[0]) for cell in cells[2:5]] == list(shown)
        assert float(cells[5].split()[0]) == pytest.approx(found["hours"], rel=0.02)
        assert float(cells[7].split()[0]) == pytest.approx(found["disk_gb"], rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_doctor_estimates_a_preset(name: str, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "matmul_rate", lambda: 1e12)
    found = answer("doctor", "--preset", name)["preset"]
    assert "not measured" in found["how"]
    there, here = (value for key, value in found.items() if key.startswith("at "))
    assert there["hours_training"] == doctor.estimate(PRESETS[name])["hours_training"]
    assert here["hours_training"] == pytest.approx(400 * there["hours_training"], rel=0.02)
    assert answer("doctor", "--profile", name)["estimate"]["memory_gb"] > 1


# ---- training


def trained(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """config.json of a run."""
    given = ("--layer", 1, "--out", folder, "--held-out-tokens", 300, *options)
    assert lorsa("train", "--preset", name, *given) == 0
    return dict(store.read_json(folder / "config.json"))


@pytest.mark.parametrize("name", KINDS)
def test_train_fills_in_the_preset_and_explicit_options_win(
    name: str, tiny: dict[str, config.Preset], tmp_path: Path
) -> None:
    saved = trained(name, tmp_path / "run", "--k", "3")
    module = saved["module"]
    assert (module["n_ov_heads"], module["n_qk_heads"], module["k"]) == (96, 8, 3)
    assert (saved["train"]["tokens"], saved["train"]["batch_size"], saved["source"]["context"]) == (600, 4, 32)
    assert saved["source"]["model"] == tiny[name].model
    assert saved["source"]["text"] == PRESETS[name].dataset
    opened: Any = load(tmp_path / "run")
    assert opened.config.rotary == models.load_model(tiny[name].model).site(1).rotary
    assert opened.config.qk_norm == (name == "qwen3-1.7b")
    assert torch.isfinite(opened(torch.randn(1, 8, opened.config.d_model)).y).all()


@pytest.mark.usefixtures("tiny")
def test_text_of_ones_own_takes_the_place_of_the_presets(tmp_path: Path) -> None:
    assert trained("pythia-160m", tmp_path / "run", "--text", "a.txt")["source"]["text"] == ["a.txt"]


@pytest.mark.usefixtures("tiny")
def test_notebooks_run_in_the_size_of_a_preset() -> None:
    run = notebook.start("02_train_lorsa", "qwen3-1.7b")
    assert run.profile.name == "qwen3-1.7b"
    assert notebook.banners(run.folder) == []
    model = models.load_model(run.profile.model)
    cache = recipes.activation_cache(run, model, recipes.sequences(run, model))
    assert load(recipes.main_lorsa(run, model, ActivationCache(cache, "train", model=model))).n_units == 96


# ---- out of reach


class GatedRepoError(Exception):
    """As huggingface_hub raises it."""


def test_gated_weights_leave_a_banner_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started() -> tuple[notebook.Context, str]:
        run = notebook.start("02_train_lorsa", "llama-3.1-8b")
        return run, gallery.write_index(run.folder, "llama-3.1-8b").read_text(encoding="utf-8")

    hub_raises(monkeypatch, GatedRepoError("403 Client Error."))
    run, page = started()
    told = capsys.readouterr().out
    assert "meta-llama/Llama-3.1-8B is gated: accept its licence" in told
    assert "hf auth login" in told
    assert "goes on with smollm2 in the sizes of the laptop" in told
    assert run.profile == config.PROFILES["laptop"]
    assert '<p class="banner" role="alert">meta-llama/Llama-3.1-8B is gated' in page
    assert "results of the laptop profile" in page
    assert notebook.profile_of_run(run.folder, "llama-3.1-8b") == "laptop"

    monkeypatch.setattr("huggingface_hub.auth_check", lambda name: None)
    run, page = started()
    assert run.profile.name == "llama-3.1-8b"
    assert 'role="alert"' not in page


def test_the_banner_is_shown_inside_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(notebook, "_display", lambda bundle: not shown.append(bundle))
    notebook.start("04_heads", "paper")
    assert "This run goes on with smollm2" in shown[0]["text/plain"]
    assert 'role="alert"' in shown[0]["text/html"]


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.auth_check", Mock(side_effect=error))


@pytest.mark.parametrize("error", [ConnectionError("No route to host"), OSError("We couldn't connect")])
def test_no_network_is_told_in_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, error)
    with pytest.raises(UserError, match="cannot be loaded .*check the name and the network, or use smollm2") as caught:
        models.require_available("EleutherAI/pythia-160m")
    assert "\n" not in str(caught.value)


def test_weights_that_are_here_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        models.require_available("EleutherAI/pythia-160m")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    models.require_available("EleutherAI/pythia-160m")
    models.require_available("smollm2")


def test_smoke_and_laptop_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "require_available", None)
    for profile in ("smoke", "laptop"):
        run = notebook.start("00_test", profile)
        assert run.profile.name == profile
        assert not (run.folder / notebook.BANNERS_FILE).exists()
