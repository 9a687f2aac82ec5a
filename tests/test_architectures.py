"""Every entry of the table of architectures goes through every command that reads it: a forgotten field fails here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import KINDS, save_tiny_model, settings
from torch import nn

from lorsa_utils.architectures import ARCHITECTURES
from lorsa_utils.kit import cli
from lorsa_utils.models import load_model

WORDS = ["attention", "head", "layer", "of", "the", "model", "reads", "writes", "a", "token"]
SHAPE = ("--n-heads", 32, "--n-qk", 4, "--k", 4, "--context", 32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=120)) for _ in range(30)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    prompts = [["".join(rng.choices("abcdefgh", k=6)) for _ in range(2)] for _ in range(8)]
    rows = [{"clean": clean, "corrupted": other, "answer": "x", "wrong": "y"} for clean, other in prompts]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_every_architecture_has_a_tiny_model() -> None:
    assert {settings(kind)[0] for kind in KINDS} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_of_a_block_is_named(kind: str, tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path, kind), device="cpu")
    block = model.block(1)
    parts = {name: part for name, part in block.named_modules() if not name.startswith(model.architecture.attention)}
    norms = [name for name, p in parts.items() if isinstance(p, nn.LayerNorm) or hasattr(p, "variance_epsilon")]
    assert set(norms) == {*model.architecture.norms}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_architecture(
    kind: str,
    text: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("lorsa_utils.heads.tasks.require_able", lambda name, found: None)
    model = save_tiny_model(tmp_path / "model", kind)

    def answer(*arguments: object) -> Any:
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    file = tmp_path.joinpath
    run, source = file("run"), ("--model", model, "--text", text)
    answer("train", *source, "--layer", 1, "--out", run, *SHAPE, "--tokens", 1500, "--held-out-tokens", 300)
    heads = answer("heads", run, "--text", text, "--tokens", 300, "--out", file("heads.parquet"))
    assert heads["heads"] == 32
    answer("show", run, "--head", 5, "--text", text, "--tokens", 300, "--out", file("page.html"))
    circuit = answer("circuit", run, "--prompts", pairs, "--graph", file("graph.json"), "--traced", 2)
    assert circuit["graph"]["traced"] == 2
    answer("export", run, file("published"))
    imported = answer("import", file("published"), file("imported"), *source, "--tokens", 300)
    assert len(imported["fvu"]) == 2, "both readings were tried: before and after the norm's gain"
