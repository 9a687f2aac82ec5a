"""Published weights compute here what they compute there, are read the way that works, and nothing in them is run."""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import calling
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model
from torch import Tensor
from toys import ROTARY, random_inputs, random_lorsa, random_sae, random_sequences, randomized

from lorsa_utils import store
from lorsa_utils.activations import ActivationStream
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import initialize
from lorsa_utils.kit import formats, hub
from lorsa_utils.lorsa import Lorsa, Scaling, load
from lorsa_utils.models import LanguageModel, load_model

D, N_QK, D_QK, N_OV, LENGTH = 8, 2, 4, 6, 7


# ---- what the formats compute, in float64


def frequencies(config: Mapping[str, Any]) -> Tensor:
    """Radians per token by which each pair of dimensions turns."""
    f = config["rotary_base"] ** -(torch.arange(0, config["rotary_dim"], 2, dtype=torch.float64) / config["rotary_dim"])
    if not config.get("use_NTK_by_parts_rope"):
        return f
    low, high = config["NTK_by_parts_low_freq_factor"], config["NTK_by_parts_high_freq_factor"]
    smooth = ((config["old_context_len"] * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * f / config["NTK_by_parts_factor"] + smooth * f


def queries_or_keys(side: str, x: Tensor, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """[groups, length, d_qk] for x [length, D]."""
    rows = x @ t[f"W_{side}"] + t[f"b_{side}"][:, None]
    if config.get("use_post_qk_ln"):
        rows = rows / (rows.square().mean(dim=-1, keepdim=True) + config["eps"]).sqrt()
        rows = rows * t[f"ln_{side.lower()}.w"][:, None]
    if config["positional_embedding_type"] != "rotary":
        return rows
    turned, rest = rows.split([config["rotary_dim"], rows.shape[-1] - config["rotary_dim"]], dim=-1)
    adjacent = config["rotary_adjacent_pairs"]
    pairs = turned.unflatten(-1, (-1, 2)) if adjacent else turned.unflatten(-1, (2, -1)).mT
    angles = torch.arange(len(x))[:, None] * frequencies(config)
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return torch.cat(((turned if adjacent else turned.mT).flatten(-2), rest), dim=-1)


def head_activations(x: Tensor, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """z [length, n_ov] of both formats for inputs in the space of the weights."""
    q, k = (queries_or_keys(side, x, t, config) for side in "QK")
    future = torch.ones(len(x), len(x)).triu(1).bool()
    pattern = (q @ k.mT / config["attn_scale"]).masked_fill(future, -math.inf).softmax(dim=-1)
    v = x @ t["W_V"].flatten(1).T + t["b_V"].flatten()
    return torch.einsum("hij,jh->ih", pattern.repeat_interleave(N_OV // len(pattern), dim=0), v)


def forward(x: Tensor, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Output [length, D] of either format for raw inputs [length, D]."""
    if "mode" in config:  # OpenMOSS/Lorsa
        norms, is_topk = config["avg_norm"], config["mode"] == "top_k"
        rectifies = is_topk and config["use_z_relu"]
    else:
        norms = {side: t.get(formats.NORM_PREFIX + config[f"hook_point_{side}"]) for side in ("in", "out")}
        is_topk, rectifies = config["act_fn"] == "topk", True
    scale = {side: 1.0 if norm is None else math.sqrt(D) / float(norm) for side, norm in norms.items()}
    z = head_activations(x * scale["in"], t, config)
    z, writes = z.relu() if rectifies else z, t["W_O"].flatten(1)
    kept = (z.abs() * writes.norm(dim=1)).topk(config["top_k"] if is_topk else N_OV).indices
    z = torch.zeros_like(z).scatter(1, kept, z.gather(1, kept))
    return (z @ writes + t.get("b_D", t.get("b_O", 0))) / scale["out"]


# ---- random checkpoints


def llamascopium(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"sae_type": "lorsa", "d_model": D, "expansion_factor": N_OV / D, "use_decoder_bias": True}
    config |= {"act_fn": "topk", "top_k": 2, "norm_activation": "inference", "sparsity_include_decoder_norm": True}
    config |= {"hook_point_in": "blocks.1.ln1.hook_normalized", "hook_point_out": "blocks.1.hook_attn_out"}
    config |= {"n_qk_heads": N_QK, "d_qk_head": D_QK, "use_post_qk_ln": False, "eps": 1e-6, "skip_bos": True}
    config |= {"positional_embedding_type": "rotary", "rotary_dim": D_QK, "rotary_base": 100}
    config |= {"rotary_adjacent_pairs": False, "n_ctx": 32, "attn_scale": 2.0}
    return config | changes


def llamascopium_weights(config: Mapping[str, Any], seed: int = 0, stored_groups: int = N_QK) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("W_Q", "W_K"), (stored_groups, D, D_QK))
    shapes |= {"W_V": (N_OV, D), "W_O": (N_OV, D), "b_V": (N_OV,)}
    shapes |= dict.fromkeys(("b_Q", "b_K"), (stored_groups, D_QK))
    shapes |= {"b_D": (D,)} if config["use_decoder_bias"] else {}
    shapes |= dict.fromkeys(("ln_q.w", "ln_k.w"), (stored_groups, D_QK)) if config["use_post_qk_ln"] else {}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.7 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    if config["norm_activation"] == "dataset-wise":
        for side, norm in (("in", 5.0), ("out", 0.7)):
            tensors[formats.NORM_PREFIX + config[f"hook_point_{side}"]] = torch.tensor(norm)
    return tensors


def write_llamascopium(folder: Path, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    config = llamascopium(**changes)
    stored = {name: tensor.float() for name, tensor in (tensors or llamascopium_weights(config)).items()}
    stored |= {"mask": torch.ones(4, 4).tril().bool(), "rotary_sin": torch.zeros(4, D_QK)}
    store.write_tensors(folder / "sae_weights.safetensors", stored | {"IGNORE": torch.tensor(-torch.inf)})
    store.write_json(folder / "config.json", config)
    return folder


def openmoss(**changes: Any) -> dict[str, Any]:
    same = ("n_", "d_", "rotary", "positional", "attn")
    config = {name: value for name, value in llamascopium().items() if name.startswith(same)}
    config |= {"n_ov_heads": N_OV, "d_ov_head": 1, "avg_norm": {"in": 4.0, "out": 0.5}, "virtual_kv_num": 0, "layer": 1}
    config |= {"mode": "top_k", "top_k": 2, "use_z_relu": False, "dtype": "torch.float32", "device": "cuda"}
    return config | changes


def openmoss_weights(seed: int = 0) -> dict[str, Tensor]:
    t = llamascopium_weights(llamascopium(), seed)
    return t | {"W_V": t["W_V"][:, :, None], "W_O": t["W_O"][:, None], "b_V": t["b_V"][:, None], "b_O": t.pop("b_D")}


def write_openmoss(folder: Path, tensors: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    buffers = {"mask": torch.ones(4, 4), "IGNORE": torch.tensor(-torch.inf)}
    torch.save({**openmoss_weights(), **(tensors or {}), **buffers}, folder / "final.pth")
    store.write_json(folder / "config.json", openmoss(**changes))
    return folder


def as_here(folder: Path) -> Lorsa:
    published = formats.read(folder)
    return published.as_read(published.reading).double()


def computes_the_same(
    write: Callable[..., Path], tensors: Mapping[str, Tensor], config: dict[str, Any], seed: int = 0
) -> Lorsa:
    x = random_inputs(1, LENGTH, D, seed + 1, torch.float64)
    with tempfile.TemporaryDirectory() as place:
        lorsa = as_here(write(Path(place), tensors, **config))
    assert (lorsa(x).y[0] - forward(x[0], tensors, config)).abs().max() < 1e-5
    return lorsa


# ---- same outputs


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    options=st.fixed_dictionaries(
        {
            "positional_embedding_type": st.sampled_from(("rotary", "rotary", "none")),
            "rotary_dim": st.sampled_from((2, D_QK)),
            "rotary_adjacent_pairs": st.booleans(),
            "use_NTK_by_parts_rope": st.booleans(),
            "use_post_qk_ln": st.booleans(),
            "norm_activation": st.sampled_from(("inference", "dataset-wise")),
            "act_fn": st.sampled_from(("topk", "topk", "relu")),
            "use_decoder_bias": st.booleans(),
            "attn_scale": st.sampled_from((2.0, 0.8)),
            "top_k": st.integers(1, N_OV),
        }
    ),
    stored_groups=st.sampled_from((1, N_QK)),
)
def test_llamascopium_weights_compute_the_same(seed: int, options: dict[str, Any], stored_groups: int) -> None:
    config = llamascopium(**options, normalization_type="RMS" if options["use_post_qk_ln"] else None)
    config |= {"NTK_by_parts_factor": 8.0, "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0}
    config["old_context_len"] = 24
    tensors = llamascopium_weights(config, seed, stored_groups)
    lorsa = computes_the_same(write_llamascopium, tensors, config, seed)
    if options["positional_embedding_type"] == "rotary":
        assert lorsa.config.rotary.adjacent_pairs == options["rotary_adjacent_pairs"]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    options=st.fixed_dictionaries(
        {
            "rotary_adjacent_pairs": st.booleans(),
            "rotary_dim": st.sampled_from((2, D_QK)),
            "mode": st.sampled_from(("top_k", "top_k", "default")),
            "use_z_relu": st.booleans(),
            "top_k": st.integers(1, 2),
        }
    ),
)
def test_openmoss_weights_compute_the_same(seed: int, options: dict[str, Any]) -> None:
    computes_the_same(write_openmoss, openmoss_weights(seed), openmoss(**options), seed)


def test_the_reference_rotates_by_position() -> None:
    """The reference would agree with anything if scores did not depend on positions."""
    config = llamascopium()
    x = random_inputs(1, LENGTH, D, 3, torch.float64)[0]
    z, *others = (
        head_activations(x, llamascopium_weights(config), config | change)
        for change in ({}, {"positional_embedding_type": "none"}, {"rotary_adjacent_pairs": True})
    )
    assert all((z - other).abs().max() > 1e-2 for other in others)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"k": 24},
        {"attn_scale": 0.3},
        {"rotary": ROTARY.replace(adjacent_pairs=True)},
        {"rotary": ROTARY.replace(rope_type="llama3", factor=4.0, original_context=16)},
    ],
)
def test_what_is_exported_computes_the_same_there_and_here(tmp_path: Path, changes: dict[str, Any]) -> None:
    lorsa = random_lorsa(**changes)
    lorsa.save(tmp_path / "run")
    answer = hub.export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert answer["keys"]["b_O"] == "b_D"
    config = store.read_json(tmp_path / "out" / "config.json")
    assert int(config["d_model"] * config["expansion_factor"]) == lorsa.n_units
    assert config["attn_scale"] == pytest.approx(1 / lorsa.attn_scale)
    back = as_here(tmp_path / "out")
    x = random_inputs(2, 9, dtype=torch.float64)
    assert (back(x).y - lorsa.double()(x).y).abs().max() < 1e-6
    shapes, wanted = ({name: value.shape for name, value in m.state_dict().items()} for m in (back, lorsa))
    assert shapes == wanted
    assert "Language-Model-SAEs" in (tmp_path / "out" / "README.md").read_text()


def test_export_refuses_what_the_format_lacks(tmp_path: Path) -> None:
    cases = {
        "score abs": random_lorsa(score="abs"),
        "scaling 'linear'": random_lorsa(rotary=ROTARY.replace(rope_type="linear", factor=2.0)),
        "whole number": random_lorsa(rotary=ROTARY.replace(theta=10.5)),
        "holds a sae": random_sae(),
    }
    for sentence, module in cases.items():
        module.save(tmp_path / sentence)
        with pytest.raises(UserError, match=sentence):
            hub.export_checkpoint(tmp_path / sentence, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_expansion_factor_gives_back_the_number_of_heads() -> None:
    for n_ov in range(1, 200, 7):
        config = random_lorsa().config.replace(n_ov_heads=n_ov, n_qk_heads=1, k=1)
        written = formats.llamascopium_config(config, {})
        assert int(config.d_model * written["expansion_factor"]) == n_ov


# ---- refusals


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        formats.read(folder)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


REFUSED: dict[str, dict[str, Any]] = {
    "sae_type 'sae'": {"sae_type": "sae"},
    "act_fn 'jumprelu'": {"act_fn": "jumprelu"},
    "act_fn 'batchtopk'": {"act_fn": "batchtopk"},
    "norm_activation 'token-wise'": {"norm_activation": "token-wise"},
    "sparsity_include_decoder_norm false": {"sparsity_include_decoder_norm": False},
    "normalization_type": {"use_post_qk_ln": True, "normalization_type": "LN"},
    "rotary_scale 2": {"rotary_scale": 2},
    "NTK_by_parts_low_freq_factor": {"use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 8.0},
    "expansion_factor 4": {"expansion_factor": 4},
    "size mismatch for W_Q": {"d_qk_head": 8},
    "n_heads": {"n_qk_heads": 4},
    "must not exceed the number of heads": {"top_k": 99},
}


@pytest.mark.parametrize(("sentence", "settings"), REFUSED.items())
def test_options_that_lorsa_lacks_are_refused_by_name(sentence: str, settings: dict[str, Any], tmp_path: Path) -> None:
    refused(write_llamascopium(tmp_path, **settings), sentence)


def test_selection_without_lengths_is_the_same_where_all_lengths_are_equal() -> None:
    config = llamascopium(sparsity_include_decoder_norm=False)
    tensors = llamascopium_weights(config)
    tensors["W_O"] /= tensors["W_O"].norm(dim=1, keepdim=True)
    computes_the_same(write_llamascopium, tensors, config)


def test_older_options_that_lorsa_lacks_are_refused(tmp_path: Path) -> None:
    refused(write_openmoss(tmp_path, virtual_kv_num=4), "virtual_kv_num 4")
    refused(write_openmoss(tmp_path, top_k=None), "mode top_k but no top_k")
    refused(write_openmoss(tmp_path, {"virtual_k": torch.zeros(1, N_QK, D_QK)}), "virtual_k, which")
    refused(write_openmoss(tmp_path, {"W_V": torch.zeros(N_OV, D, 2)}), "size mismatch for W_V")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write_openmoss(tmp_path / "bad", {"x": Malicious(tmp_path / "was_run")})
    refused(folder, "wants to run code when it is read, which is refused")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("file", ["final.pth", "sae_weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.98])
def test_cut_files_are_refused(file: str, share: float, tmp_path: Path) -> None:
    folder = (write_openmoss if file == "final.pth" else write_llamascopium)(tmp_path)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    refused(folder, "is damaged")


def test_other_folders_and_tensors_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")
    store.write_json(tmp_path / "config.json", llamascopium())
    refused(tmp_path, "neither sae_weights.safetensors nor final.pth")
    tensors = llamascopium_weights(llamascopium())
    for change, sentence in (
        ({"W_X": torch.zeros(2)}, "holds W_X, which Lorsa here does not have"),
        ({"ln_q.w": torch.ones(N_QK, D_QK)}, "Unexpected key.*q_norm"),
        ({"b_V": torch.zeros(N_OV + 1)}, "size mismatch for b_V"),
        ({"W_V": torch.full((N_OV, D), torch.nan)}, "values that are not finite"),
    ):
        refused(write_llamascopium(tmp_path, tensors | change), sentence)
    del tensors["W_K"]
    refused(write_llamascopium(tmp_path, tensors), "has no W_K")


# ---- readings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"), device="cpu")


def copied(model: LanguageModel) -> tuple[Lorsa, Tensor]:
    """An untrained Lorsa from the model's own heads, better than the mean, and inputs that it reads."""
    sequences = random_sequences(12, 24)
    x, y = model.capture(sequences.tokens.long(), [1])[1]
    lorsa = Lorsa(Lorsa.config_for_site(model.site(1), 512, 32, 256))
    lorsa.fold(initialize(lorsa, model.site(1), x, y, sequences.mask, "mhsa", 0))
    return lorsa.requires_grad_(False), x


@pytest.fixture(scope="module")
def good(model: LanguageModel) -> Lorsa:
    return copied(model)[0]


def saved(folder: Path, lorsa: Lorsa) -> Path:
    lorsa.save(folder / "run")
    config = store.read_json(folder / "run" / "config.json") | {"layer": 1, "source": {"context": 24}}
    store.write_json(folder / "run" / "config.json", config)
    return folder / "run"


def exported(folder: Path, lorsa: Lorsa, **settings: Any) -> Path:
    hub.export_checkpoint(saved(folder, lorsa), folder / "out")
    store.write_json(folder / "out" / "config.json", store.read_json(folder / "out" / "config.json") | settings)
    return folder / "out"


def for_normalised(folder: Path, lorsa: Lorsa, folded: bool) -> Path:
    """An export that says it is for normalised activations, and is unless the norms are folded in."""
    lorsa, size = copy.deepcopy(lorsa), math.sqrt(lorsa.config.d_model)
    if not folded:
        lorsa.unfold(Scaling(torch.zeros(lorsa.config.d_model), size, size / 30))
    file = exported(folder, lorsa, norm_activation="dataset-wise") / "sae_weights.safetensors"
    names = [f"{formats.NORM_PREFIX}blocks.1.{name}" for name in ("ln1.hook_normalized", "hook_attn_out")]
    store.write_tensors(file, store.read_tensors(file) | dict(zip(names, map(torch.tensor, (1.0, 30.0)), strict=True)))
    return file.parent


def imported(folder: Path, model: LanguageModel) -> dict[str, Any]:
    def stream(context: int, layer: int) -> ActivationStream:
        return ActivationStream(model, random_sequences(12, context), [layer], "random")

    return hub.import_checkpoint(folder, folder.parent / "here", stream=stream)


def test_an_exported_lorsa_comes_back_without_a_word(tmp_path: Path, model: LanguageModel, good: Lorsa) -> None:
    answer = imported(exported(tmp_path, good), model)
    assert (answer["reading"], answer["warning"]) == ("raw activations", None)
    assert answer["fvu"]["raw activations"] < 0.9
    back = load(tmp_path / "here")
    torch.testing.assert_close(back.state_dict(), good.state_dict(), rtol=1e-6, atol=1e-8)
    config = store.read_json(tmp_path / "here" / "config.json")
    assert (config["layer"], config["imported"]["format"]) == (1, "llamascopium")
    assert config["source"]["model_sha256"] == model.fingerprint


def test_folded_weights_whose_config_says_otherwise_are_found_out(
    tmp_path: Path, model: LanguageModel, good: Lorsa
) -> None:
    answer = imported(for_normalised(tmp_path, good, folded=True), model)
    assert answer["reading"] == "raw activations"
    assert answer["fvu"]["normalised activations"] > answer["fvu"]["raw activations"]
    assert "The config asks for normalised activations, but the weights work on raw activations" in answer["warning"]


def test_weights_for_normalised_activations_are_folded(tmp_path: Path, model: LanguageModel, good: Lorsa) -> None:
    answer = imported(for_normalised(tmp_path, good, folded=False), model)
    assert (answer["reading"], answer["warning"]) == ("normalised activations", None)
    back: Any = load(tmp_path / "here")
    assert torch.allclose(back.W_Q, good.W_Q, rtol=1e-5)
    assert torch.allclose(back.b_O, good.b_O, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_weights_for_the_input_before_the_gain_are_found_out(tmp_path: Path, kind: str) -> None:
    model = load_model(save_tiny_model(tmp_path / "model", kind), device="cpu")
    lorsa, x = copied(model)
    gain = hub.norm_gain(model, 1)
    before = copy.deepcopy(lorsa)
    before.shift_inputs(-gain[1])  # the same layer for u = (x - bias) / gain
    for weight in (before.W_Q, before.W_K):
        weight.mul_(gain[0][:, None])
    before.W_V.mul_(gain[0])
    answer = imported(exported(tmp_path, before), model)
    assert answer["reading"] == "raw activations, before the gain of the norm"
    assert "work on raw activations, before the gain" in answer["warning"]
    assert torch.allclose(load(tmp_path / "here")(x).y, lorsa(x).y, atol=1e-3)


def test_random_weights_are_imported_with_a_warning(tmp_path: Path, model: LanguageModel, good: Lorsa) -> None:
    noise = randomized(Lorsa(good.config), 1, torch.float32)
    answer = imported(exported(tmp_path, noise), model)
    assert "worse than predicting the mean" in answer["warning"]


def test_without_a_model_the_config_is_believed_and_nothing_is_claimed(tmp_path: Path) -> None:
    settings = {"norm_activation": "dataset-wise", "sparkle": 3}
    folder = write_llamascopium(tmp_path / "there", **settings)
    answer = hub.import_checkpoint(folder, tmp_path / "here")
    assert (answer["layer"], answer["fvu"], answer["ignored"]) == (1, {}, ["sparkle"])
    assert "Nothing was measured" in answer["warning"]
    assert "sparkle" in answer["warning"]
    assert answer["keys"]["b_D"] == "b_O"
    with pytest.raises(UserError, match="is not empty; choose a new folder"):
        hub.import_checkpoint(folder, tmp_path / "here")
    unnormed = write_llamascopium(tmp_path / "unnormed", llamascopium_weights(llamascopium()), **settings)
    with pytest.raises(UserError, match="does not state their norms; give --model"):
        hub.import_checkpoint(unnormed, tmp_path / "other")


def test_a_model_of_another_width_or_an_unknown_layer_is_refused(
    tmp_path: Path, model: LanguageModel, good: Lorsa
) -> None:
    folder = write_llamascopium(tmp_path / "there")
    with pytest.raises(UserError, match="has width 64, the checkpoint 8"):
        imported(folder, model)
    nameless = exported(tmp_path, good, hook_point_in="somewhere")
    with pytest.raises(UserError, match="does not say which layer it is for; give --layer"):
        imported(nameless, model)
    assert not (tmp_path / "here").exists()


# ---- commands and the Hub


def test_commands_export_and_import(
    tmp_path: Path,
    model: LanguageModel,
    good: Lorsa,
    capsys: pytest.CaptureFixture[str],
    answer: Any,
    complaint: Any,
) -> None:
    run, out, bare = saved(tmp_path, good), tmp_path / "out", tmp_path / "bare"
    assert answer("export", run, out)["keys"]["W_V"] == "W_V"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text, long enough to be cut into sequences." for i in range(60)))
    options = ("--text", text, "--tokens", 500)
    assert answer("import", out, tmp_path / "here", "--model", model.name, *options)["keys"]["b_D"] == "b_O"
    assert answer("eval", tmp_path / "here", *options)["n_tokens"] > 400
    assert calling.lorsa("import", out, bare) == 0
    assert "Nothing was measured" in capsys.readouterr().err
    assert "does not say which model and layer it is for; import it again with --model" in complaint("eval", bare)


@pytest.mark.parametrize(("inside", "pattern"), [("layer_3/k64", "layer_3/k64/config.json"), ("", "config.json")])
def test_the_hub_is_asked_for_one_folder(
    inside: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llamascopium(tmp_path / inside)
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.download(f"someone/lorsas:{inside}".rstrip(":")) == tmp_path / inside
    assert download.call_args.args == ("someone/lorsas",)
    assert pattern in download.call_args.kwargs["allow_patterns"]


def test_without_a_network_the_hub_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConnectionError("Cannot reach the server\nmore lines")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    with pytest.raises(UserError, match="cannot be downloaded: Cannot reach the server; check the network") as caught:
        hub.download("someone/lorsas:layer_3")
    assert "\n" not in str(caught.value)
    for impossible in ("someone/lorsas:../secrets", "a b/c:d", "https://example.org/x"):
        with pytest.raises(UserError, match="There is no checkpoint at"):
            hub.download(impossible)


class FakeHub:
    """What huggingface_hub's API does, on the local disk; or it refuses uploads with a status."""

    def __init__(self, place: Path, status: int = 0) -> None:
        self.place, self.status, self.private = place, status, False

    def create_repo(self, repo_id: str, exist_ok: bool, private: bool) -> None:
        (self.place / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private = private

    def upload_folder(
        self, repo_id: str, folder_path: str, path_in_repo: str | None, ignore_patterns: list[str]
    ) -> str:
        if self.status:
            error = RuntimeError("no")
            error.response = SimpleNamespace(status_code=self.status)  # type: ignore[attr-defined]
            raise error
        left_out = shutil.ignore_patterns(*(pattern.split("/")[0] for pattern in ignore_patterns))
        shutil.copytree(folder_path, self.place / repo_id / (path_in_repo or ""), ignore=left_out, dirs_exist_ok=True)
        return f"https://hub.example/{repo_id}"


def test_push_uploads_the_folder_with_its_card_and_no_token(
    tmp_path: Path, good: Lorsa, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    run, repos = saved(tmp_path, good), tmp_path / "hub" / "someone"
    store.write_text(run / "state" / "state.safetensors", "large")
    options = ("--push", "someone/lorsas", "--path-in-repo", "layer_1", "--private")
    assert answer("export", run, tmp_path / "out", *options)["url"] == "https://hub.example/someone/lorsas"
    uploaded = repos / "lorsas" / "layer_1"
    assert {file.name for file in uploaded.iterdir()} == {"config.json", "sae_weights.safetensors", "README.md"}
    assert fake.private
    assert formats.read(uploaded).layer == 1
    hub.push_to_hub(run, "someone/runs")
    assert "# Lorsa for layer 1" in (repos / "runs" / "README.md").read_text()
    assert not (repos / "runs" / "state").exists()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_secretsecret" not in file.read_bytes()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "you are not logged in; check the name and run `hf auth login`"),
        (403, "access is restricted"),
        (404, "it does not exist"),
    ],
)
def test_a_refused_upload_says_what_to_do(
    status: int, sentence: str, tmp_path: Path, good: Lorsa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(tmp_path / "hub", status))
    good.save(tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        hub.push_to_hub(tmp_path / "run", "someone/lorsas")
    with pytest.raises(UserError, match="is no repository on the Hub; give <user>/<name>"):
        hub.push_to_hub(tmp_path / "run", "lorsas")


def test_a_small_checkpoint_is_written_and_imported_by_command(tmp_path: Path, good: Lorsa, answer: Any) -> None:
    run, small = saved(tmp_path, good), tmp_path / "small"
    written = answer("export", run, small, "--format", "small")
    assert written["bytes"] < 0.5 * (run / "model.safetensors").stat().st_size
    answer("import", small, tmp_path / "full")
    assert torch.allclose(load(tmp_path / "full").W_O, good.W_O, atol=float(good.W_O.abs().max()) / 127)
    assert store.read_json(small / "checkpoint.json")["kit"]
