"""Streamed and cached activations are the same; a killed cache goes on to the same bytes; the foreign is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, save_tiny_model
from toys import ToySource, random_sequences

from lorsa_utils import activations, store
from lorsa_utils.activations import (
    ActivationBatch,
    ActivationCache,
    ActivationStream,
    build_cache,
    bytes_per_sequence,
    estimate_cache,
    prepared_ahead,
)
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import LanguageModel, load_model
from lorsa_utils.text import Sequences

LAYERS = (0, 1)
CONTEXT = 12
SHARD_OF_SIX = 6 * CONTEXT * (2 * 2 * D_MODEL * 4 + 5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def lm(model_folder: Path) -> LanguageModel:
    return load_model(model_folder, device="cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six sequences a shard in float32, so that the train split below has four shards."""
    monkeypatch.setattr(activations, "SHARD_BYTES", SHARD_OF_SIX)


def splits() -> dict[str, Sequences]:
    return {"train": random_sequences(21, CONTEXT), "held_out": random_sequences(5, CONTEXT, seed=1)}


def build(lm: LanguageModel, folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"dtype": "float32", "batch_size": 3, "progress": False} | changes
    layers = options.pop("layers", LAYERS)
    return build_cache(lm, options.pop("splits", splits()), layers, folder, **options)


@pytest.fixture
def cache(lm: LanguageModel, tmp_path: Path) -> Path:
    return build(lm, tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def joined(batches: Sequence[ActivationBatch]) -> dict[str, torch.Tensor]:
    """All rows in order, under one name for each kind of row."""
    result = {
        "tokens": torch.cat([batch.tokens for batch in batches]),
        "mask": torch.cat([batch.mask for batch in batches]),
    }
    for layer in batches[0].inputs:
        result[f"{layer}.input"] = torch.cat([batch.inputs[layer] for batch in batches])
        result[f"{layer}.output"] = torch.cat([batch.outputs[layer] for batch in batches])
    return result


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# ---- one interface


def test_cache_equals_stream_bit_for_bit(lm: LanguageModel, cache: Path) -> None:
    for split, sequences in splits().items():
        stream, stored = (
            ActivationStream(lm, sequences, LAYERS),
            ActivationCache(cache, split, model=lm, bos_policy="prepend"),
        )
        assert stored.identity() == stream.identity()
        for name in ("layers", "n_sequences", "n_tokens", "context"):
            assert getattr(stored, name) == getattr(stream, name), name
        for found, expected in zip(stored.batches(3), stream.batches(3), strict=True):
            assert_same(joined([found]), joined([expected]))


def test_rows_are_what_the_model_computes(lm: LanguageModel, cache: Path) -> None:
    sequences = splits()["train"]
    rows = joined(list(ActivationCache(cache).batches(8)))
    assert torch.equal(rows["tokens"], sequences.tokens.long())
    assert torch.equal(rows["mask"], sequences.mask)
    for layer, (read, written) in lm.capture(sequences.tokens.long(), LAYERS).items():
        assert torch.allclose(rows[f"{layer}.input"], read, atol=1e-5)
        assert torch.allclose(rows[f"{layer}.output"], written, atol=1e-5)
        assert rows[f"{layer}.output"].std() > 0.1


@pytest.mark.parametrize("batch_size", [1, 5, 6, 7, 20, 100])
def test_batch_size_and_start_do_not_change_cached_rows(cache_once: Path, batch_size: int) -> None:
    source = ActivationCache(cache_once)
    rows = joined(list(source.batches(4)))
    for start in (0, 1, 5, 6, 13, 20):
        batches = list(source.batches(batch_size, start))
        assert_same(joined(batches), {name: tensor[start:] for name, tensor in rows.items()})
        sizes = [len(batch.tokens) for batch in batches]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@pytest.fixture(scope="module")
def cache_once(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SHARD_BYTES", SHARD_OF_SIX)
        folder = build(lm, tmp_path_factory.mktemp("shared") / "cache")
    assert len(list(folder.glob("train-*.safetensors"))) == 4
    return folder


def test_batch_size_and_start_change_streamed_rows_by_rounding_alone(lm: LanguageModel) -> None:
    source = ActivationStream(lm, splits()["train"], LAYERS)
    every = joined(list(source.batches(21)))
    found = joined(list(source.batches(4, start=5)))
    for name, tensor in every.items():
        assert torch.allclose(found[name].double(), tensor[5:].double(), atol=1e-5), name


@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_of_a_batch_make_up_the_batch(lm: LanguageModel, cache_once: Path, world: int) -> None:
    """Sequences go round the ranks; a rank without one gets a step in which nothing counts."""
    for source in (ActivationCache(cache_once), ActivationStream(lm, splits()["train"], LAYERS)):
        for parts in zip(
            source.batches(5), *(source.batches(5, part=(rank, world)) for rank in range(world)), strict=True
        ):
            whole, shares = parts[0], parts[1:]
            assert all(torch.equal(share.whole_mask, whole.mask) for share in shares)
            assert sum(int(share.mask.sum()) for share in shares) == int(whole.mask.sum())
            for rank, share in enumerate(shares):
                if rank < len(whole.tokens):
                    assert torch.equal(share.tokens, whole.tokens[rank::world])
                    assert torch.allclose(share.outputs[1], whole.outputs[1][rank::world], atol=1e-5)
                else:
                    assert share.mask.shape == (1, whole.mask.shape[1])
                    assert not share.mask.any()


def test_batches_prepared_ahead_are_the_same(cache_once: Path) -> None:
    source, cpu = ActivationCache(cache_once), torch.device("cpu")
    for found, expected in zip(prepared_ahead(source.batches(4), cpu), source.batches(4), strict=True):
        assert_same(joined([found]), joined([expected]))
    before = threading.active_count()
    ahead = prepared_ahead(source.batches(4), cpu)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before, "a thread was left behind"


def test_an_error_in_the_preparing_thread_reaches_the_caller() -> None:
    def broken() -> Iterator[ActivationBatch]:
        yield from ToySource().batches(5)
        raise UserError("the shard is gone.")

    ahead = prepared_ahead(broken(), torch.device("cpu"))
    assert len(list(itertools.islice(ahead, 4))) == 4
    with pytest.raises(UserError, match="the shard is gone"):
        next(ahead)


def test_past_the_end_there_is_nothing(lm: LanguageModel, cache_once: Path) -> None:
    assert list(ActivationCache(cache_once).batches(4, start=21)) == []
    assert list(ActivationStream(lm, splits()["train"], LAYERS).batches(4, start=21)) == []


def test_some_of_the_layers(lm: LanguageModel, cache_once: Path) -> None:
    for source in (ActivationCache(cache_once), ActivationStream(lm, splits()["train"], LAYERS)):
        batch = next(iter(source.batches(3, layers=[1])))
        assert set(batch.inputs) == set(batch.outputs) == {1}
        assert torch.equal(batch.outputs[1], next(iter(source.batches(3))).outputs[1])
    with pytest.raises(UserError, match=r"holds layers \[0, 1\], not 2; cache that layer"):
        next(iter(ActivationCache(cache_once).batches(3, layers=[2])))


def test_one_pass_serves_all_layers_and_stops_after_the_deepest(lm: LanguageModel) -> None:
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *arguments: calls.update([name])

    base = lm.model.base_model
    hooks = [base.register_forward_pre_hook(count("model"))]
    hooks += [block.register_forward_pre_hook(count(str(index))) for index, block in enumerate(base.layers)]
    list(ActivationStream(lm, splits()["train"], LAYERS).batches(4))
    for hook in hooks:
        hook.remove()
    assert calls == {"model": 6, "0": 6, "1": 6}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_and_no_more(lm: LanguageModel, tmp_path: Path, dtype: str) -> None:
    source = ActivationCache(build(lm, tmp_path / "cache", dtype=dtype), "held_out")
    batch, exact = (
        next(iter(source.batches(5))),
        next(iter(ActivationStream(lm, splits()["held_out"], LAYERS).batches(3))),
    )
    assert batch.outputs[1].dtype == torch.float32
    assert torch.equal(batch.outputs[1][:3], exact.outputs[1].to(getattr(torch, dtype)).float())
    assert source.identity()["dtype"] == dtype


# ---- kill and go on


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way, as nothing catches a kill."""


@pytest.mark.parametrize("writes", [1, 3, 5, 6])
def test_a_run_killed_between_shard_and_manifest_goes_on_to_the_same_bytes(
    lm: LanguageModel, cache_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    real, count = store.write_json, 0

    def write(path: Path, content: Any) -> None:
        nonlocal count
        count += 1
        if count == writes + 1:
            raise Killed
        real(path, content)

    monkeypatch.setattr(store, "write_json", write)
    with pytest.raises(Killed):
        build(lm, tmp_path / "cache")
    monkeypatch.setattr(store, "write_json", real)
    with pytest.raises(UserError, match=r"is unfinished"):
        ActivationCache(tmp_path / "cache")
    assert contents(build(lm, tmp_path / "cache")) == contents(cache_once)


def test_going_on_does_not_compute_finished_shards_again(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = activations._write_shard

    def write(path: Path, manifest: dict[str, Any], split: str, tensors: dict[str, torch.Tensor]) -> None:
        if split == "held_out":
            raise Killed
        real(path, manifest, split, tensors)

    monkeypatch.setattr(activations, "_write_shard", write)
    with pytest.raises(Killed):
        build(lm, tmp_path / "cache")
    monkeypatch.setattr(activations, "_write_shard", real)
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("train-*")}
    build(lm, tmp_path / "cache")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("train-*")} == written
    assert build(lm, tmp_path / "cache") == tmp_path / "cache"  # a finished one is left as it is
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("train-*")} == written


KILLED_CACHE = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
import test_activations
from lorsa_utils import activations, store
from lorsa_utils.models import load_model

activations.SHARD_BYTES = test_activations.SHARD_OF_SIX
replace = os.replace
def killed_at_the_third_shard(source, target):
    if str(target).endswith("train-00002.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
store.os.replace = killed_at_the_third_shard
test_activations.build(load_model(sys.argv[1], device="cpu"), Path(sys.argv[2]))
"""


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that sees the package and the tests."""
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments, str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_kill_9_in_the_middle_of_a_shard(
    lm: LanguageModel, cache_once: Path, model_folder: Path, tmp_path: Path
) -> None:
    killed = run_script(KILLED_CACHE, str(model_folder), str(tmp_path / "cache"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = contents(tmp_path / "cache")
    assert [name for name in left if name.endswith(".safetensors")] == [
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    assert any(name.endswith(".tmp") for name in left), "the kill came too early or too late to test anything"
    with pytest.raises(UserError, match=r"is unfinished; run the same `lorsa cache` command again"):
        ActivationCache(tmp_path / "cache")
    assert contents(build(lm, tmp_path / "cache")) == contents(cache_once)


# ---- refusals


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_cut_shard_is_named(cache: Path) -> None:
    shard = cache / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001.safetensors is cut or foreign \(\d+ bytes instead of \d+\)"):
        ActivationCache(cache)


@pytest.mark.parametrize("place", [3, -1])
def test_a_flipped_bit_is_named_before_its_rows_are_given(cache: Path, place: int) -> None:
    flip(cache / "train-00001.safetensors", place)
    batches = ActivationCache(cache).batches(3)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(UserError, match=r"train-00001.safetensors is damaged"):
        next(batches)


def test_a_missing_a_foreign_and_a_swapped_shard_are_named(cache: Path) -> None:
    first, second = cache / "train-00000.safetensors", cache / "train-00001.safetensors"
    shutil.copy(first, cache / "train-00009.safetensors")
    with pytest.raises(UserError, match=r"train-00009.safetensors does not belong to this cache"):
        ActivationCache(cache)
    (cache / "train-00009.safetensors").unlink()
    shutil.copy(first, second)
    with pytest.raises(UserError, match=r"train-00001.safetensors is damaged"):
        list(ActivationCache(cache).batches(3))
    second.unlink()
    with pytest.raises(UserError, match=r"train-00001.safetensors is missing"):
        ActivationCache(cache)


def test_shards_without_a_manifest_are_not_adopted(lm: LanguageModel, cache: Path) -> None:
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is not an activation cache \(manifest.json is missing\)"):
        ActivationCache(cache)
    with pytest.raises(
        UserError, match=r"holds held_out-00000.safetensors but no manifest.json; choose an empty folder"
    ):
        build(lm, cache)


def test_a_cut_manifest_and_another_schema(cache: Path) -> None:
    manifest = cache / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"manifest.json is not valid JSON"):
        ActivationCache(cache)
    manifest.write_text(json.dumps(json.loads(whole) | {"schema_version": 99}))
    with pytest.raises(UserError, match=r"has schema version 99"):
        ActivationCache(cache)


def test_an_unknown_split(cache_once: Path) -> None:
    with pytest.raises(UserError, match=r"has no split 'test', it has train, held_out"):
        ActivationCache(cache_once, "test")


def test_the_cache_of_another_model_or_tokenizer_or_bos_policy_is_refused(
    model_folder: Path, cache_once: Path, tmp_path: Path
) -> None:
    other = load_model(save_tiny_model(tmp_path / "other", "llama", seed=1), device="cpu")
    with pytest.raises(UserError, match=r"was made with another model"):
        ActivationCache(cache_once, model=other)
    respelled = load_model(model_folder, device="cpu")
    respelled.tokenizer.add_tokens(["lorsa"])
    with pytest.raises(UserError, match=r"was made with another tokenizer"):
        ActivationCache(cache_once, model=respelled)
    with pytest.raises(UserError, match=r"has BOS policy 'prepend', asked is 'none'"):
        ActivationCache(cache_once, bos_policy="none")


def test_the_folder_of_another_cache_is_not_continued(
    lm: LanguageModel, model_folder: Path, cache: Path, tmp_path: Path
) -> None:
    before = contents(cache)
    other = load_model(save_tiny_model(tmp_path / "other", "llama", seed=1), device="cpu")
    respelled = load_model(model_folder, device="cpu")
    respelled.tokenizer.add_tokens(["lorsa"])
    half = load_model(model_folder, device="cpu", dtype=torch.bfloat16)
    text = random_sequences(21, CONTEXT, seed=7)
    held_out = splits()["held_out"]
    changes: list[tuple[LanguageModel, dict[str, Any], str]] = [
        (lm, {"dtype": "bfloat16"}, "dtype is 'float32', asked is 'bfloat16'"),
        (lm, {"layers": (0,)}, r"layers is \[0, 1\], asked is \[0\]"),
        (lm, {"splits": {"train": text, "held_out": held_out}}, "train text_sha256 is"),
        (
            lm,
            {"splits": {"train": random_sequences(21, CONTEXT, bos_policy="none"), "held_out": held_out}},
            "train bos_policy is 'prepend'",
        ),
        (
            lm,
            {"splits": {"train": random_sequences(22, CONTEXT), "held_out": held_out}},
            "train n_sequences is 21, asked is 22",
        ),
        (lm, {"splits": {"train": splits()["train"]}}, "held_out"),
        (other, {}, "model"),
        (respelled, {}, "tokenizer_sha256"),
        (half, {}, "model_sha256"),
    ]
    for model, change, sentence in changes:
        with pytest.raises(UserError, match=f"holds another cache: its .*{sentence}"):
            build(model, cache, **change)
    assert contents(cache) == before


def test_settings_that_cannot_be_are_refused_before_anything_is_written(lm: LanguageModel, tmp_path: Path) -> None:
    for change, sentence in (
        ({"dtype": "int8"}, r"dtype 'int8' is not supported"),
        ({"layers": (0, 3)}, r"Layer 3 does not exist"),
        ({"layers": ()}, r"No layer was named"),
    ):
        with pytest.raises(UserError, match=sentence):
            build(lm, tmp_path / "cache", **change)
    assert not list(tmp_path.glob("cache/*"))
    with pytest.raises(UserError, match=r"Layer 3 does not exist"):
        ActivationStream(lm, splits()["train"], (0, 3))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write to"):
        build(lm, tmp_path / "file")


def test_the_disk_is_not_filled(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 26 * bytes_per_sequence(D_MODEL, 2, CONTEXT, "float32")
    reserve = 1 << 30
    monkeypatch.setattr(store, "free_bytes", lambda path: reserve + needed - 1)
    with pytest.raises(
        UserError, match=r"The activation cache needs 0.0 GB .* free some space, ask for less, or choose another folder"
    ):
        build(lm, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.safetensors"))
    monkeypatch.setattr(store, "free_bytes", lambda path: reserve + needed)
    build(lm, tmp_path / "cache")


def test_the_estimate_is_near_what_is_written(lm: LanguageModel, cache_once: Path) -> None:
    estimate = estimate_cache(lm, splits()["train"], LAYERS, "float32", batch_size=3)
    shards = [file.stat().st_size for file in cache_once.glob("train-*.safetensors")]
    headers = 1024 * len(shards)
    assert estimate.bytes_on_disk <= sum(shards) <= estimate.bytes_on_disk + headers
    assert estimate.seconds > 0
    assert estimate.bytes_in_memory > 4 * sum(parameter.numel() for parameter in lm.model.parameters())
    assert "seconds" in estimate.sentence()


def test_an_os_error_while_writing_is_a_sentence(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full)
        with pytest.raises(UserError, match=r"The disk is full: .*train-00000.safetensors was not written"):
            build(lm, tmp_path / "cache")
    build(lm, tmp_path / "cache")
