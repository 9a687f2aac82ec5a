"""Models: what hooks read is what the model computes, and every head can be rebuilt from config and weights."""

import shutil
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import (
    D_MODEL,
    KINDS,
    LLAMA3,
    N_LAYERS,
    byte_tokenizer,
    random_tokens,
    rope,
    save_tiny_gguf,
    save_tiny_model,
)
from transformers import AutoModelForCausalLM

from lorsa_utils import store
from lorsa_utils.config import RotaryConfig
from lorsa_utils.fetch import is_complete
from lorsa_utils.models import LanguageModel, load_model, resolve_device, rotary_from_config

LENGTH = 96  # three times the original context of the tiny Llama
load = partial(load_model, device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny_model(tmp_path_factory.mktemp(kind) / "model", kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def lm(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture
def llama(folders: dict[str, Path]) -> LanguageModel:
    return load(folders["llama"])


# ---- parity with the model


def test_patterns_equal_the_models_own(folder: Path, lm: LanguageModel) -> None:
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        expected = eager(tokens, output_attentions=True).attentions
    inputs = lm.capture(tokens, range(N_LAYERS))
    for layer in range(N_LAYERS):
        pattern = lm.site(layer).pattern(inputs[layer][0])
        assert pattern.shape == expected[layer].shape
        assert (pattern - expected[layer]).abs().max() < 1e-5
        assert pattern[..., -1, :].std() > 1e-3, "uniform patterns would hide the rotation"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_neox", {"rope_parameters": rope(rope_type="linear", factor=4.0, partial_rotary_factor=0.25)}),
        ("llama", {"rope_parameters": rope(rope_type="llama3", **LLAMA3 | {"original_max_position_embeddings": 16})}),
        ("llama", {"rope_parameters": rope(rope_type="llama3", **LLAMA3 | {"high_freq_factor": 2.0})}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("llama", {"attention_bias": False}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_other_scalings_and_biases(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder = save_tiny_model(tmp_path / "changed", kind, **changes)
    lm = load(folder)
    assert bool(lm.site(0).b_Q.any()) == changes.get("attention_bias", True)
    test_patterns_equal_the_models_own(folder, lm)
    test_heads_sum_to_the_output(lm)


def test_heads_sum_to_the_output(lm: LanguageModel) -> None:
    for layer, (x, output) in lm.capture(random_tokens(2, LENGTH), range(N_LAYERS)).items():
        site = lm.site(layer)
        parts = site.head_outputs(x)
        assert parts.shape == (2, LENGTH, site.n_heads, D_MODEL)
        assert output.std() > 0.1
        assert (parts.sum(dim=2) + site.b_O - output).abs().max() < 1e-5


def test_weights_per_head_have_the_promised_shapes(lm: LanguageModel) -> None:
    site = lm.site(2)
    n, n_kv, d_head = site.n_heads, site.n_kv_heads, site.d_head
    kv_heads, width = (getattr(lm.config, name, None) for name in ("num_key_value_heads", "head_dim"))
    assert (n, n_kv, d_head) == (4, kv_heads or 4, width or D_MODEL // 4)
    shapes = {"W_Q": (n, D_MODEL, d_head), "W_O": (n, d_head, D_MODEL), "b_Q": (n, d_head), "b_O": (D_MODEL,)}
    shapes |= dict.fromkeys(("W_K", "W_V"), (n_kv, D_MODEL, d_head)) | dict.fromkeys(("b_K", "b_V"), (n_kv, d_head))
    assert {name: tuple(getattr(site, name).shape) for name in shapes} == shapes
    assert site.expand_kv(site.W_K).shape == site.W_Q.shape
    assert torch.equal(site.expand_kv(site.W_V)[n // n_kv - 1], site.W_V[0])
    assert site.qk_norm == hasattr(lm.attention_module(2), "q_norm") == (site.k_norm_weight is not None)
    assert lm.attention_module(2) is lm.model.get_submodule(lm.module_path(2))


def test_weights_are_copies(lm: LanguageModel) -> None:
    for weights in (lm.site(0).W_Q, lm.site(0).b_O):
        weights.zero_()
    after = lm.site(0)
    assert after.W_Q.any()
    *_, (_, bias) = lm.architecture.projections(lm.config, lm.attention_module(0))
    assert bool(after.b_O.any()) == (bias is not None)


# ---- where the hooks are


def test_the_site_lies_between_the_norm_and_the_residual_sum(lm: LanguageModel) -> None:
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        states = lm.model(tokens, output_hidden_states=True).hidden_states
        for layer, (x, output) in lm.capture(tokens, [0, 1]).items():
            before, after, block = states[layer], states[layer + 1], lm.block(layer)
            norms = [block.get_submodule(name) for name in lm.architecture.norms]
            middle = before + output
            read_by_mlp = before if getattr(lm.config, "use_parallel_residual", False) else middle
            written = block.get_submodule(lm.architecture.mlp)(norms[1](read_by_mlp))
            assert torch.equal(norms[0](before), x)
            assert torch.allclose(middle + written, after, atol=1e-5)


def test_logits_through_hooks_are_the_plain_ones(lm: LanguageModel) -> None:
    tokens = random_tokens(2, 40)
    plain = lm.model(tokens).logits
    with lm.splice({layer: lambda x, output: output for layer in range(N_LAYERS)}):
        assert torch.equal(lm.logits(tokens), plain)
        lm.capture(tokens, [0, 2])
    assert torch.equal(lm.logits(tokens), plain)
    assert torch.equal(lm.model(tokens).logits, plain)
    assert torch.allclose(lm.logits(tokens, [5, -1]), plain[:, [5, -1]], atol=1e-5)
    assert not lm.attention_module(0)._forward_hooks


def test_splice_replaces_the_output(lm: LanguageModel) -> None:
    tokens = random_tokens(2, 24)
    plain = lm.logits(tokens)
    seen = Mock(side_effect=lambda x, output: torch.zeros_like(output))
    clean = lm.capture(tokens, [1, 2])
    with lm.splice({1: seen}):
        assert not torch.allclose(lm.logits(tokens), plain, atol=1e-2)
        spliced = lm.capture(tokens, [1, 2])
    assert all(torch.equal(*pair) for pair in zip(seen.call_args.args, clean[1], strict=True))
    assert not spliced[1][1].any()
    assert not torch.allclose(spliced[2][0], clean[2][0], atol=1e-2)
    assert torch.equal(lm.logits(tokens), plain)


def test_gradients_reach_the_replacement(lm: LanguageModel) -> None:
    scale = torch.ones((), requires_grad=True)
    with lm.splice({1: lambda x, output: scale * output}):
        lm.logits(random_tokens(1, 8)).square().mean().backward()
    assert scale.grad is not None
    assert scale.grad != 0
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_hooks_are_removed_after_an_error(lm: LanguageModel) -> None:
    tokens = random_tokens(1, 8)
    with refused(r"layer 1 has shape \[1, 8, 1\]"), lm.splice({1: lambda x, y: y[..., :1]}):
        lm.logits(tokens)
    with refused("Layer 7"), lm.splice(dict.fromkeys((0, 7), lambda x, y: y)):
        pass
    for layer, ask in ((7, lambda layer: lm.capture(tokens, [0, layer])), (-1, lm.site), (N_LAYERS, lm.site)):
        with refused(rf"Layer {layer} .*choose one of 0\.\.2"):
            ask(layer)
    assert not any(lm.attention_module(layer)._forward_hooks for layer in range(N_LAYERS))


def visits(lm: LanguageModel, part: str) -> list[int]:
    """A list that grows by the layer whenever that part of it runs."""
    visited: list[int] = []
    for layer in range(N_LAYERS):
        module = lm.block(layer).get_submodule(part)
        module.register_forward_hook(lambda *_, layer=layer: visited.append(layer))
    return visited


def test_capture_stops_after_the_deepest_layer(lm: LanguageModel) -> None:
    visited = visits(lm, lm.architecture.mlp)
    captured = lm.capture(random_tokens(2, 8), [1, 0])
    assert list(captured) == [1, 0]
    assert visited == [0]
    assert all(not tensor.requires_grad for pair in captured.values() for tensor in pair)
    lm.capture(random_tokens(2, 8), [2])
    assert max(visited) == 1


def test_a_pass_resumed_at_a_layer_is_the_whole_pass(lm: LanguageModel) -> None:
    tokens = random_tokens(2, 24)
    plain, losses, sides = lm.logits(tokens), lm.loss(tokens)[0], lm.capture(tokens, [1, 2])
    ran = visits(lm, lm.architecture.attention)
    for layer in range(N_LAYERS):
        residual = lm.residual(tokens, layer)
        assert ran == list(range(layer)), "the pass ends at the block"
        assert residual.shape == (2, 24, lm.d_model)
        ran.clear()
        with lm.resume(layer, residual):
            assert torch.equal(lm.logits(tokens), plain)
            assert ran == list(range(layer, N_LAYERS))
            assert torch.equal(lm.loss(tokens)[0], losses)
            if layer <= 1:
                again = lm.capture(tokens, [1, 2])
                assert all(torch.equal(*pair) for n in (1, 2) for pair in zip(again[n], sides[n], strict=True))
            else:
                with pytest.raises(KeyError):
                    lm.capture(tokens, [1, layer])
        assert torch.equal(lm.logits(tokens), plain), "afterwards the whole model runs"
        ran.clear()


def test_resume_reads_what_it_is_given_and_meets_splices(lm: LanguageModel) -> None:
    tokens, sites = random_tokens(2, 24), []
    residual = lm.residual(tokens, 1)

    def zeros(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sites.append(lm.site(2))
        return torch.zeros_like(y)

    with lm.splice({2: zeros}):
        expected = lm.logits(tokens)
        with lm.resume(1, residual):
            assert torch.equal(lm.logits(tokens), expected)
    with lm.resume(1, residual), lm.splice({2: zeros}):
        assert torch.equal(lm.logits(tokens), expected)
    assert torch.equal(sites[-1].W_Q, lm.site(2).W_Q), "layers keep their numbers"
    with lm.resume(1, torch.zeros_like(residual)):
        first, other = (lm.capture(words, [1])[1][0][0] for words in (tokens, tokens.flip(1)))
        assert torch.equal(first, other), "tokens are not read any more"


def test_a_pass_resumed_among_layers_of_several_types_is_the_whole_pass(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", *["sliding_attention"] * (N_LAYERS - 2)]
    changes = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    lm = load(save_tiny_model(tmp_path / "mixed", "qwen3", **changes))
    tokens = random_tokens(2, 24)
    plain = lm.logits(tokens)
    with lm.resume(1, lm.residual(tokens, 1)):
        assert torch.equal(lm.logits(tokens), plain)


def test_an_error_inside_resume_leaves_the_whole_model(lm: LanguageModel) -> None:
    tokens = random_tokens(2, 24)
    plain, residual = lm.logits(tokens), lm.residual(tokens, 2)
    # type: ignore[dict-item]
    with pytest.raises(ZeroDivisionError), lm.resume(2, residual), lm.splice({2: lambda x, y: 1 / 0}):
        lm.logits(tokens)
    assert torch.equal(lm.logits(tokens), plain)


# ---- loss and tokens


@pytest.mark.parametrize("values_at_once", [1, 1000, 1 << 26])
def test_loss_is_the_cross_entropy_of_the_next_token(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, values_at_once: int
) -> None:
    monkeypatch.setattr("lorsa_utils.models._LOGIT_VALUES_AT_ONCE", values_at_once)
    tokens = random_tokens(3, 10)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 0] = mask[1, 6:] = False
    losses, counted = lm.loss(tokens, mask)
    expected = lm.model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(losses[counted], -expected[counted], atol=1e-4)
    assert not losses[~counted].any()
    assert torch.equal(counted, mask[:, 1:])
    assert lm.loss(tokens)[1].all()


def test_padding_on_the_right_changes_nothing_before_it(lm: LanguageModel) -> None:
    tokens = random_tokens(1, 20)
    padded = torch.cat((tokens, torch.full((1, 12), 258)), dim=1)
    assert torch.allclose(lm.loss(tokens)[0], lm.loss(padded)[0][:, :19], atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.zeros(4, dtype=torch.long), "batch, length"),
        (torch.zeros(1, 0, dtype=torch.long), "batch, length"),
        (torch.zeros(1, 4), "integers"),
        (torch.tensor([[0, 259]]), "Token id 259 is outside 0..258"),
        (torch.tensor([[0, -1]]), "Token id -1"),
    ],
)
def test_impossible_tokens_are_refused(llama: LanguageModel, tokens: torch.Tensor, sentence: str) -> None:
    for call in (llama.logits, llama.loss, lambda tokens: llama.capture(tokens, [0])):
        with refused(sentence):
            call(tokens)


def test_too_long_a_sequence_is_refused(folders: dict[str, Path]) -> None:
    lm = load(folders["gpt2"])
    with refused("learned positions for 128"):
        lm.logits(random_tokens(1, 129))


# ---- loading


def test_loaded_models_are_frozen_and_described(lm: LanguageModel) -> None:
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert (lm.d_model, lm.n_layers, lm.context_length, lm.dtype) == (D_MODEL, N_LAYERS, 128, torch.float32)
    assert lm.revision is None
    assert lm.tokenizer("abc").input_ids == byte_tokenizer()("abc").input_ids
    assert lm.tokenizer.bos_token_id == 256
    assert lm.tokenizer.decode(lm.tokenizer("Été <b>").input_ids) == "Été <b>"


def test_dtype_is_the_one_asked_for(folders: dict[str, Path]) -> None:
    lm = load(folders["llama"], dtype=torch.bfloat16)
    x, output = lm.capture(random_tokens(1, 8), [1])[1]
    assert x.dtype == output.dtype == lm.dtype == torch.bfloat16
    site = lm.site(1)
    assert site.W_Q.dtype == site.pattern(x).dtype == torch.float32
    with lm.splice({1: lambda x, output: output.float()}):
        assert torch.equal(lm.logits(random_tokens(1, 8)), lm.model(random_tokens(1, 8)).logits)


def test_local_paths_never_touch_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Mock(side_effect=AssertionError("a socket was opened"))
    monkeypatch.setattr(socket.socket, "connect", opened)
    monkeypatch.setattr(socket, "getaddrinfo", opened)
    load(str(folder)).logits(random_tokens(1, 4))


def test_local_gguf_files_load_like_the_folder_they_were_made_from(tmp_path: Path) -> None:
    lm = load(save_tiny_gguf(tmp_path / "tiny.gguf"))
    original = load(tmp_path / "tiny.folder")
    tokens = random_tokens(2, LENGTH)
    assert torch.equal(lm.logits(tokens), original.logits(tokens))
    assert lm.rotary == original.rotary
    ids = [model.tokenizer("A bridge\n of 1872.", add_special_tokens=False).input_ids for model in (lm, original)]
    assert ids[0] == ids[1]
    assert lm.tokenizer("thin", add_special_tokens=False).input_ids == [259, 260]
    test_heads_sum_to_the_output(lm)


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model folder with some fields of its config changed."""
    shutil.copytree(source, target)
    config = store.read_json(target / "config.json") | changes
    store.write_json(target / "config.json", {name: value for name, value in config.items() if value is not None})
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "bert"}, "'bert' is not supported; supported are gpt2, gpt_neox, llama, qwen3"),
        ({"model_type": "made_up", "auto_map": {"AutoConfig": "evil.Config"}}, "'made_up' is not supported"),
        (
            {"rope_parameters": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)},
            "'yarn' of this model is not supported; supported are default, linear, llama3",
        ),
        ({"rope_parameters": {"full_attention": rope(), "sliding_attention": rope()}}, "differs between layer types"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_unknown_architectures_and_ropes_are_named_with_what_is_supported(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with refused(sentence):
        load(edited(folders["llama"], tmp_path / "changed", **changes))


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    lm = load(save_tiny_model(tmp_path / "sliding", "qwen3", **windows))
    assert lm.site(0).n_heads == 4
    with refused("Layer 1 .* sliding_attention"):
        lm.site(1)


def test_rope_that_differs_between_config_and_model_is_refused(llama: LanguageModel) -> None:
    llama.model.base_model.rotary_emb.inv_freq[2] *= 1.01
    with refused("rotary frequencies"):
        LanguageModel("changed", llama.model, None)


def test_configs_in_the_spelling_of_transformers_4_load(folders: dict[str, Path], tmp_path: Path) -> None:
    def rotary_of(kind: str, **older: Any) -> RotaryConfig:
        return load(edited(folders[kind], tmp_path / kind, rope_parameters=None, **older)).rotary

    rotary = rotary_of("llama", rope_theta=500000.0, rope_scaling=LLAMA3 | {"rope_type": "llama3"})
    assert (rotary.rope_type, rotary.theta, rotary.factor, rotary.original_context) == ("llama3", 500000.0, 8.0, 32)
    rotary = rotary_of("gpt_neox", rotary_pct=0.5, rotary_emb_base=20000)
    assert (rotary.rope_type, rotary.rotary_dim, rotary.theta) == ("default", 8, 20000.0)


def test_rope_without_a_factor_is_refused() -> None:
    scaling = rope(rope_type="llama3", factor=8.0)
    config = SimpleNamespace(model_type="llama", hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    with refused("without low_freq_factor"):
        rotary_from_config(config)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/at/all", "gone.gguf", "two words"])
def test_missing_paths_are_refused(name: str) -> None:
    with refused(f"There is no model at {name}"):
        load(name)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty/weights", b"", r"no config\.json"),
        ("model.bin", b"weights", r"not a \.gguf"),
        ("broken.gguf", b"GGUF but no more", "cannot be read"),
        ("llama/model.safetensors", b"cut", "cannot be read"),
        ("llama/model.safetensors", None, "cannot be read"),
        ("llama/config.json", b"{", "cannot be read"),
    ],
)
def test_broken_files_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / name
    if name.startswith("llama"):
        shutil.copytree(folders["llama"], tmp_path / "llama")
    file.parent.mkdir(exist_ok=True)
    file.unlink() if content is None else file.write_bytes(file.read_bytes()[:-100] if content == b"cut" else content)
    with refused(sentence):
        load(file if file.parent == tmp_path else file.parent)


def test_a_folder_of_half_a_model_and_pickled_weights_are_refused(
    folders: dict[str, Path], llama: LanguageModel, tmp_path: Path
) -> None:
    folder = edited(folders["llama"], tmp_path / "half")
    weights = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if ".1.self_attn." not in name}
    save_file(kept, weights, {"format": "pt"})
    with refused(r"not a whole causal language model: model\.layers\.1\.self_attn"):
        load(folder)
    weights.unlink()
    torch.save(llama.model.state_dict(), folder / "pytorch_model.bin")
    with refused("cannot be read"):
        load(folder)


def test_offline_hub_ids_are_sought_in_the_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refused("HF_HUB_OFFLINE is set"):
        load("nobody/no-such-model")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError("You are trying to access a gated repo.\nAsk for access."), "accept its licence .* `hf auth login`"),
        (MemoryError(), "does not fit in memory"),
        (ValueError("what\nwhy"), r"cannot be loaded \(.*; check the name and the network"),
    ],
)
def test_models_that_cannot_be_had_are_told_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", Mock(side_effect=error))
    with refused(sentence):
        load("meta-llama/Llama-3.1-8B")


def test_a_model_without_tokenizer_loads_until_the_tokenizer_is_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    bare = edited(folders["gpt2"], tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    lm = load(bare)
    assert lm.logits(random_tokens(1, 4)).isfinite().all()
    with refused("no tokenizer"):
        _ = lm.tokenizer


def test_unknown_devices_are_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99"):
        with refused(f"Device '{name}' is not available"):
            resolve_device(name)


# ---- fingerprints


def test_fingerprints_are_stable_and_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    first, again = load(folder), load(folder)
    assert first.fingerprint == again.fingerprint
    assert first.tokenizer_fingerprint == again.tokenizer_fingerprint
    changed = load(folder)
    next(changed.attention_module(1).parameters()).view(-1)[1500] += 1e-3
    assert changed.fingerprint != first.fingerprint
    assert load(folder, dtype=torch.bfloat16).fingerprint != first.fingerprint
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert load(moved).fingerprint == first.fingerprint


def test_fingerprints_see_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    first = load(folders["qwen3"]).fingerprint
    assert load(edited(folders["qwen3"], tmp_path / "eps", rms_norm_eps=1e-3)).fingerprint != first
    theta = edited(folders["qwen3"], tmp_path / "theta", rope_parameters=rope(5.0))
    assert load(theta).fingerprint != first


def test_tokenizer_fingerprint_ignores_how_it_was_called_and_sees_its_tokens(folders: dict[str, Path]) -> None:
    plain, called, changed = (load(folders["llama"]) for _ in range(3))
    called.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    changed.tokenizer.add_tokens(["<new>"])
    assert called.tokenizer_fingerprint == plain.tokenizer_fingerprint != changed.tokenizer_fingerprint


# ---- the embedded model


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    if not is_complete(store.data_dir() / "models" / "smollm2"):
        pytest.skip("the embedded model is not there; `lorsa fetch` makes it")
    return load("smollm2")


def test_embedded_model_heads_sum_to_its_output(smollm2: LanguageModel) -> None:
    text = "The old bridge crosses the river just north of the town. " * 8
    tokens = smollm2.tokenizer(text, return_tensors="pt").input_ids
    for layer, (x, output) in smollm2.capture(tokens, [0, 17, 29]).items():
        site = smollm2.site(layer)
        assert (site.n_heads, site.n_kv_heads, site.d_head, site.rotary.theta) == (9, 3, 64, 100000.0)
        error = (site.head_outputs(x).sum(dim=2) + site.b_O - output).abs().max()
        assert error < 1e-5 * output.abs().max()
    losses, _ = smollm2.loss(tokens)
    assert losses[:, :12].mean() > 2.0
    assert losses[:, 40:].mean() < 0.5, "repeated text is predicted by copying"
