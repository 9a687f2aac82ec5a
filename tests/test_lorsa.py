"""Lorsa and SAE equal loops in value and gradient; patterns are exact splits; saved modules come back bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny_models import save_tiny_model
from torch import Tensor
from toys import ROTARY, lorsa_configs, random_inputs, random_lorsa, random_sae, randomized

from lorsa_utils import reference, store
from lorsa_utils.config import LorsaConfig, SAEConfig
from lorsa_utils.lorsa import SAE, Lorsa, Scaling, load
from lorsa_utils.models import load_model

LLAMA3 = ROTARY.replace(rope_type="llama3", rotary_dim=2, factor=8.0, original_context=8, adjacent_pairs=True)


def keeps_clear_of_ties(module: Lorsa | SAE, x: Tensor, gap: float = 1e-3) -> bool:
    """Whether no score at the boundary of the selection, and no kept z at the kink of relu, is near another."""
    z, k = module.pre_activations(x), module.k
    scores = module.selection().scores(z).sort(dim=-1, descending=True).values
    apart = k == module.n_units or bool((scores[..., k - 1] - scores[..., k] > gap).all())
    return apart and bool((z.abs() > gap).all())


# ---- equations


@settings(max_examples=40)
@given(config=lorsa_configs(), batch=st.integers(1, 2), length=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_equals_the_loops(config: LorsaConfig, batch: int, length: int, seed: int) -> None:
    module = randomized(Lorsa(config), seed)
    x = random_inputs(batch, length, config.d_model, seed + 1, torch.float64)
    loops = [reference.lorsa_forward(row, module.state_dict(), config) for row in x]
    y, z, indices = (torch.stack(side) for side in zip(*loops, strict=True))
    for backend in ("auto", "reference"):
        module.backend = backend
        output = module(x)
        assert (module.pre_activations(x) - z).abs().max() < 1e-10
        assert (output.y - y).abs().max() < 1e-10
        assert torch.equal(output.indices.sort(dim=-1).values, indices)
        assert output.indices.shape == output.values.shape == (batch, length, config.k)
        kept = module.encode(x)
        assert torch.equal(kept[0], output.indices)
        assert (module.decode(*kept, bias=False) + module.b_O - y).abs().max() < 1e-10


def test_float64_scores_are_not_rounded() -> None:
    """Two heads whose scores differ by 1e-12 are not tied."""
    module = random_lorsa(dtype=torch.float64, k=1, score="abs")
    z = torch.ones(1, 1, module.n_units, dtype=torch.float64)
    with torch.no_grad():
        module.W_O.copy_(torch.nn.functional.normalize(torch.ones_like(module.W_O), dim=1))
    z[..., 9] += 1e-12
    assert module.select(z)[0].item() == 9


def test_selection_with_another_k() -> None:
    module, x = random_lorsa(), random_inputs(2, 6)
    output = module(x, module.selection(24))
    assert output.indices.shape == (2, 6, 24)
    assert torch.allclose(output.y, module.pre_activations(x).relu() @ module.W_O + module.b_O, atol=1e-4)
    assert module.select(module.pre_activations(x), 3)[0].shape == (2, 6, 3)


# ---- gradients


@pytest.mark.parametrize(
    "changes",
    [
        *[{}, {"score": "abs"}, {"qk_norm": True, "rotary": LLAMA3}, {"n_qk_heads": 6, "k": 1}],
        *[{"k": 6, "score": "abs"}, {"n_features": 6}],
    ],
    ids=["relu", "abs", "qk_norm", "one head a group", "all heads", "sae"],
)
def test_gradients_of_the_whole_layer(changes: dict[str, Any]) -> None:
    make: Callable[..., Lorsa | SAE] = random_lorsa if "n_features" not in changes else random_sae
    small = {"n_ov_heads": 6, "n_qk_heads": 2} if make is random_lorsa else {}
    sizes = {"d_model": 5, "k": 3} | small | changes
    draws = ((make(n, torch.float64, **sizes), random_inputs(1, 3, 5, n, torch.float64)) for n in range(100))
    module, x = next(draw for draw in draws if keeps_clear_of_ties(*draw))
    names = [name for name, _ in module.named_parameters()]
    tensors = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)).y
        return result

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *tensors))


def test_gradients_flow_through_kept_heads_alone() -> None:
    module, x = random_lorsa(dtype=torch.float64), random_inputs(2, 5, dtype=torch.float64)
    pre = module.pre_activations(x).detach().requires_grad_()
    indices, values = module.select(pre)
    module.decode(indices, values).square().sum().backward()
    assert pre.grad is not None
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, indices, values > 0)
    assert torch.equal(pre.grad != 0, kept)


# ---- patterns


@pytest.mark.parametrize("qk_norm", [False, True])
def test_patterns_are_an_exact_split_of_z(qk_norm: bool) -> None:
    module, x = random_lorsa(dtype=torch.float64, qk_norm=qk_norm), random_inputs(2, 8, dtype=torch.float64)
    z, v = module.pre_activations(x), module.attention_inputs(x)[2].transpose(1, 2).flatten(2)
    for group in range(3):
        pattern = module.attention_pattern(x, group)
        assert pattern.shape == (2, 8, 8)
        assert torch.allclose(pattern.sum(-1), torch.ones(2, 8, dtype=torch.float64), atol=1e-12)
        assert pattern.triu(1).abs().max() == 0
    for head in range(24):
        split = module.z_pattern(x, head)
        assert (split.sum(-1) - z[..., head]).abs().max() < 1e-12
        assert (split - module.attention_pattern(x, head // 8) * v[:, None, :, head]).abs().max() < 1e-12


@pytest.mark.parametrize("index", [-1, 3, 24])
def test_a_head_or_group_that_does_not_exist(index: int) -> None:
    module, x = random_lorsa(), random_inputs(1, 3)
    with refused(rf"no QK group {index}; choose one from 0 to 2\."):
        module.attention_pattern(x, index)
    if index != 3:
        with refused(rf"no head {index}; choose one from 0 to 23\."):
            module.z_pattern(x, index)


def test_rotation_follows_length_and_dtype() -> None:
    """Longer inputs, shorter inputs and another dtype after each other: tables of one must not spoil another."""
    module = random_lorsa()
    x = random_inputs(1, 20)
    first = module(x[:, :4]).y
    assert torch.allclose(module(x).y[:, :4], first, atol=1e-5)
    assert torch.equal(module(x[:, :4]).y, first)
    exact = random_lorsa(dtype=torch.float64)
    assert torch.equal(module.double()(x.double()).y, exact(x.double()).y)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen3", "gpt2"])
def test_config_is_derived_from_the_model(tmp_path: Path, kind: str) -> None:
    site = load_model(save_tiny_model(tmp_path / kind, kind), device="cpu").site(1)
    config = Lorsa.config_for_site(site, n_heads=40, n_qk=8, k=7)
    assert (config.d_model, config.n_ov_heads, config.n_qk_heads, config.k) == (64, 40, 8, 7)
    assert (config.d_qk, config.rotary, config.qk_norm) == (site.d_head, site.rotary, kind == "qwen3")
    assert config.attn_scale == site.attn_scale
    assert not config.qk_norm or config.qk_norm_eps == site.qk_norm_eps


# ---- folding


MODULES: dict[str, Callable[..., Lorsa | SAE]] = {
    "lorsa": partial(random_lorsa, rotary=LLAMA3, score="abs"),
    "lorsa_qk_norm": partial(random_lorsa, rotary=LLAMA3, qk_norm=True),
    "sae": random_sae,
    "transcoder": partial(random_sae, kind="transcoder"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_folding_norms_keeps_outputs_and_selection(kind: str) -> None:
    """Also with a head that writes nothing."""
    module, x = MODULES[kind](dtype=torch.float64), random_inputs(2, 6, dtype=torch.float64)
    with torch.no_grad():
        module.W_O[5] = 0
    before = module(x)
    module.fold_norms()
    after = module(x)
    norms = module.W_O.norm(dim=1)
    assert norms[5] == 0
    assert torch.allclose(norms[norms > 0], torch.ones(23, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(before.y, after.y, atol=1e-10)
    assert torch.equal(before.indices.sort(dim=-1).values, after.indices.sort(dim=-1).values)


@pytest.mark.parametrize("kind", MODULES)
def test_folding_turns_training_space_into_raw_activations_and_back(kind: str) -> None:
    module, x = MODULES[kind](dtype=torch.float64), random_inputs(2, 6, dtype=torch.float64)
    scaling = Scaling(torch.randn(x.shape[-1], dtype=torch.float64), 0.3, 7.0)
    trained = module(scaling.inputs(x)).y
    module.fold(scaling)
    assert torch.allclose(module(x).y, trained / 7.0, atol=1e-10)
    module.unfold(scaling)
    assert torch.allclose(module(scaling.inputs(x)).y, trained, atol=1e-10)


# ---- SAE and transcoder


@given(d=st.integers(1, 6), n=st.integers(1, 9), seed=st.integers(0, 2**20), data=st.data())
def test_an_sae_equals_plain_loops(d: int, n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    module = randomized(SAE(SAEConfig(d_model=d, n_features=n, k=k)), seed).requires_grad_(False)
    x = random_inputs(2, 3, d, seed + 1, torch.float64)
    output = module(x)
    for b in range(2):
        for i in range(3):
            f = [max(0.0, float(module.W_E[j] @ x[b, i] + module.b_E[j])) for j in range(n)]
            scores = [f[j] * float(module.W_O[j].norm()) for j in range(n)]
            kept = sorted(sorted(range(n), key=lambda j: (-scores[j], j))[:k])
            y = sum((f[j] * module.W_O[j] for j in kept), module.b_O.clone())
            assert sorted(output.indices[b, i].tolist()) == kept
            assert (output.y[b, i] - y).abs().max() < 1e-10


def test_the_sae_reads_the_output_and_the_others_the_input() -> None:
    read, written = torch.zeros(1), torch.ones(1)
    assert random_sae(kind="sae").input_from(read, written) is written
    assert random_sae(kind="transcoder").input_from(read, written) is read
    assert random_lorsa().input_from(read, written) is read


# ---- saving and loading


Saved = tuple[Lorsa | SAE, Path]


@pytest.fixture(params=["lorsa", "sae"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    module = MODULES[request.param]()
    module.save(tmp_path / "run")
    return module, tmp_path / "run"


@pytest.mark.parametrize("saved", MODULES, indirect=True)
def test_a_loaded_module_is_the_saved_one(saved: Saved) -> None:
    module, folder = saved
    loaded = load(folder)
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    x = random_inputs(2, 7)
    for before, after in zip(module(x), loaded(x), strict=True):
        assert torch.equal(before, after)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_wrong_tensors_are_refused(saved: Saved) -> None:
    file = saved[1] / "model.safetensors"
    for change, sentence in (
        (lambda tensors: tensors["W_O"][3, 2].fill_(float("nan")), r"W_O holds values that are not finite"),
        (lambda tensors: tensors["W_O"][3, 2].fill_(float("inf")), r"W_O holds values that are not finite"),
        (lambda tensors: tensors.update(W_O=tensors["W_O"][:-1]), r"W_O is of shape \[23, 16\], not \[24, 16\]"),
        (lambda tensors: tensors.pop("W_O"), r"W_O is missing"),
    ):
        tensors = store.read_tensors(file)
        change(tensors)
        store.write_tensors(file, tensors)
        with refused(sentence):
            load(saved[1])
    file.write_bytes(file.read_bytes()[:-7])
    with refused(r"model.safetensors is damaged"):
        load(saved[1])
    file.unlink()
    with refused(r"model.safetensors does not exist"):
        load(saved[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda config: config.update(schema_version=99), "schema version 99"),
        (lambda config: config.pop("module"), "config.json"),
        (lambda config: config["module"].pop("kind"), "kind"),
        (lambda config: config["module"].update(kind="mlp"), "mlp"),
        (lambda config: config["module"].pop("d_model"), "d_model"),
        (lambda config: config["module"].update(colour="red"), "colour"),
        (lambda config: config["module"].update(k=25), r"k \(25\) must not exceed"),
        (lambda config: config.update(module=[1, 2]), "config.json"),
    ],
)
def test_a_wrong_config_is_refused_in_a_sentence(saved: Saved, change: Callable[[Any], Any], sentence: str) -> None:
    config = store.read_json(saved[1] / "config.json")
    change(config)
    store.write_json(saved[1] / "config.json", config)
    with refused(sentence):
        load(saved[1])


def test_no_run_folder_and_a_broken_config(tmp_path: Path, saved: Saved) -> None:
    with refused(r"is not a run folder \(config.json is missing\)"):
        load(tmp_path)
    (saved[1] / "config.json").write_text("[1]")
    with refused(r"does not say what kind of module"):
        load(saved[1])


def test_loading_as_the_other_kind_names_both(saved: Saved) -> None:
    other = SAE if isinstance(saved[0], Lorsa) else Lorsa
    with refused(r"load it with lorsa_utils.load"):
        other.load(saved[1])
