"""Small checkpoints lose little, travel whole, say where they come from, and open like any run folder."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toys import random_inputs, random_lorsa, random_sae

from lorsa_utils import store
from lorsa_utils.config import TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import cli, hub
from lorsa_utils.lorsa import SAE, Lorsa, load

SOURCE = {"text": "embedded", "model": "smollm2", "revision": None, "bos_policy": "prepend", "context": 256}
SOURCE |= {"model_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "text_sha256": "c" * 64, "dtype": "float32"}
MODEL: Any = SimpleNamespace(name="smollm2", fingerprint="a" * 64, tokenizer_fingerprint="b" * 64)


def save_run(folder: Path, module: Lorsa | SAE, layer: int = 17, **train: Any) -> Path:
    """A finished run of random weights."""
    module.save(folder)
    config = store.read_json(folder / "config.json")
    config |= {"layer": layer, "train": TrainConfig(**train).to_dict(), "processes": 1, "source": SOURCE}
    store.write_json(folder / "config.json", config)
    log = [{"step": 10 * row, "tokens": 1000 * row, "fvu": 1 / (1 + row)} for row in range(1, 201)]
    store.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    store.write_json(folder / "results.json", {"fvu": 0.125, "l0": 7.5, "n_tokens": 100})
    return folder


@pytest.fixture(params=["lorsa", "sae"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", random_lorsa() if request.param == "lorsa" else random_sae())


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
)
def test_int8_is_within_half_a_step(shape: list[int], seed: int, size: float) -> None:
    weight = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts = store.compact("w", weight)
    assert {name: part.dtype for name, part in parts.items()} == {"w": torch.int8, "w.scale": torch.float32}
    back = parts["w"].double() * parts["w.scale"].double()[..., None]
    step = weight.abs().amax(dim=-1, keepdim=True) / 127
    assert ((back - weight).abs() <= step / 2 * (1 + 1e-4)).all()


def test_a_packed_module_opens_as_it_is_and_computes_nearly_the_same(run: Path, tmp_path: Path) -> None:
    folder = hub.pack(run, tmp_path / "small")
    before, after = load(run), load(folder)
    assert after.config == before.config
    for name, weight in before.state_dict().items():
        loaded = after.state_dict()[name]
        assert loaded.dtype == torch.float32
        allowed = 2**-10 if name in hub.FLOAT16 else 1 / 127 if name in hub.INT8 else 0
        assert ((loaded - weight).abs() <= allowed * weight.abs().amax(dim=-1, keepdim=True)).all(), name
    x = random_inputs(2, 9)
    change = after.pre_activations(x) - before.pre_activations(x)
    assert change.norm() < 0.02 * before.pre_activations(x).norm()
    names = ["README.md", "checkpoint.json", "config.json", "metrics.jsonl", "model.safetensors", "results.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_unpack_gives_an_ordinary_run_folder(run: Path, tmp_path: Path) -> None:
    small = hub.pack(run, tmp_path / "small")
    folder = hub.unpack(small, tmp_path / "full")
    assert folder == hub.unpack(small, tmp_path / "full"), "a second time changes nothing"
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in load(small).state_dict().items():
        assert torch.equal(weights[name], weight)
    with pytest.raises(UserError, match="holds another run; choose an empty folder"):
        hub.unpack(small, save_run(tmp_path / "other", random_sae(), layer=3))


@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_cut_checkpoint_is_refused(run: Path, tmp_path: Path, share: float) -> None:
    small = hub.pack(run, tmp_path / "small")
    file = small / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is not the file that was packed"):
        hub.unpack(small, tmp_path / "full")
    with pytest.raises(UserError, match="is damaged"):
        load(small)
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 16]) + content[-4:])
    with pytest.raises(UserError, match="is not the file that was packed"):
        hub.check(small)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = hub.pack(save_run(tmp_path / "run", random_sae()), tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    store.write_tensors(folder / "model.safetensors", tensors | {"W_O.scale": tensors["W_O.scale"][:-1]})
    with pytest.raises(UserError, match=r"W_O.scale does not belong to W_O; restore a copy"):
        load(folder)


def test_weights_that_would_lose_too_much_are_not_packed(tmp_path: Path) -> None:
    module = random_lorsa()
    with torch.no_grad():
        module.W_Q.mul_(1e-9)  # below what float16 can tell apart
    with pytest.raises(UserError, match=r"W_Q would lose \d+.\d% of its norm"):
        hub.pack(save_run(tmp_path / "run", module), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_other_folders_are_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="mine is not empty; choose a new folder"):
        hub.pack(run, tmp_path / "mine")
    with pytest.raises(UserError, match="holds no checkpoint"):
        hub.unpack(run, tmp_path / "full")
    hub.pack(run, tmp_path / "small")
    hub.pack(run, tmp_path / "small")


def test_the_log_is_thinned_and_ends_where_the_run_ended(run: Path, tmp_path: Path) -> None:
    folder = hub.pack(run, tmp_path / "small")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 20 <= len(rows) <= hub.LOG_ROWS + 1
    assert (rows[0]["step"], rows[-1]["step"]) == (10, 2000)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_find_takes_the_longest_trained_of_the_right_kind(tmp_path: Path) -> None:
    shipped = store.data_dir() / "checkpoints"
    assert hub.find(MODEL, 17, "lorsa") is None
    for name, module, layer, tokens in (
        ("short", random_lorsa(), 17, 1000),
        ("long", random_lorsa(), 17, 2000),
        ("sae", random_sae(), 17, 9000),
        ("below", random_lorsa(), 16, 9000),
    ):
        hub.pack(save_run(tmp_path / name, module, layer, tokens=tokens), shipped / name)
    assert hub.find(MODEL, 17, "lorsa") == shipped / "long"
    assert hub.find(MODEL, 17, "sae") == shipped / "sae"
    assert hub.find(MODEL, 17, "transcoder") is None
    in_bfloat16, other = copy.copy(MODEL), copy.copy(MODEL)
    in_bfloat16.fingerprint = other.fingerprint = "d" * 64
    other.tokenizer_fingerprint = "e" * 64
    assert hub.find(in_bfloat16, 17, "lorsa") == shipped / "long"
    assert hub.find(other, 17, "lorsa") is None
    (shipped / "long" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is not the file that was packed"):
        hub.find(MODEL, 17, "lorsa")


def test_the_command_makes_a_run_with_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", random_lorsa(k=5), layer=3, tokens=5000, lr=5e-3, freeze_qk=True, aux_k=0)
    words = shlex.split(hub.train_command(store.read_json(run / "config.json")))
    assert words[:2] == ["lorsa", "train"]
    assert "--warmup" not in words, "defaults are left out"
    given: dict[str, Any] = {}
    monkeypatch.setattr("lorsa_utils.kit.commands.train", lambda options: given.update(vars(options)) or {})
    assert cli.main(words[1:]) == 0
    expected = {"layer": [3], "k": 5, "tokens": 5000, "context": 256, "lr": 5e-3, "freeze_qk": True, "aux_k": 0}
    config = random_lorsa().config
    expected |= {"model": "smollm2", "n_heads": config.n_ov_heads, "n_qk": config.n_qk_heads}
    assert {name: given[name] for name in expected} == expected


def test_the_card_says_what_it_is_and_names_no_place(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", random_lorsa())
    place = str(tmp_path.absolute())
    source = SOURCE | {"text": [f"{place}/prose.txt"], "model": f"{place}/tiny"}
    store.write_json(run / "config.json", store.read_json(run / "config.json") | {"source": source})
    store.write_json(run / "results_speeches.json", {"fvu": 0.25})
    folder = hub.pack(run, tmp_path / "small")
    for file in ("config.json", "README.md", "checkpoint.json"):
        assert place not in (folder / file).read_text()
    card = (folder / "README.md").read_text()
    parts = [
        "license: other",
        "# Lorsa for layer 17 of tiny",
        "| 0.125 |",
        "| speeches | 0.25 |",
        "prose.txt",
        "lu.load",
    ]
    for part in (*parts, "lorsa train --model tiny"):
        assert part in card
    assert "license: apache-2.0" in hub.model_card(save_run(tmp_path / "known", random_sae()))
    facts = store.read_json(folder / "checkpoint.json")
    assert facts["source_sha256"] == store.sha256_file(run / "model.safetensors")
