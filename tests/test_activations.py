"""Streamed and cached activations are the same; a killed cache goes on to the same bytes; the foreign is refused."""

import itertools
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from refusals import refused
from scripts import run_script
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
Sources = tuple[ActivationCache, ActivationStream]
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


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def joined(batches: Sequence[ActivationBatch]) -> dict[str, torch.Tensor]:
    """All rows in order, under one name for each kind of row."""
    rows = []
    for batch in batches:
        sides = {"tokens": batch.tokens, "mask": batch.mask}
        sides |= {f"{layer}.input": side for layer, side in batch.inputs.items()}
        rows.append(sides | {f"{layer}.output": side for layer, side in batch.outputs.items()})
    return {name: torch.cat([sides[name] for sides in rows]) for name in rows[0]}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same_batches(found: Iterator[ActivationBatch], expected: Iterator[ActivationBatch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same(joined([one]), joined([other]))


# ---- one interface


def test_cache_equals_stream_bit_for_bit(lm: LanguageModel, cache: Path) -> None:
    for split, sequences in splits().items():
        stream = ActivationStream(lm, sequences, LAYERS)
        stored = ActivationCache(cache, split, model=lm, bos_policy="prepend")
        assert stored.identity() == stream.identity()
        for name in ("layers", "n_sequences", "n_tokens", "context"):
            assert getattr(stored, name) == getattr(stream, name), name
        assert_same_batches(stored.batches(3), stream.batches(3))


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
    found = joined(list(source.batches(4, start=5)))
    for name, tensor in joined(list(source.batches(21))).items():
        assert torch.allclose(found[name].double(), tensor[5:].double(), atol=1e-5), name


@pytest.fixture
def sources(lm: LanguageModel, cache_once: Path) -> Sources:
    return ActivationCache(cache_once), ActivationStream(lm, splits()["train"], LAYERS)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_of_a_batch_make_up_the_batch(sources: Sources, world: int) -> None:
    """Sequences go round the ranks; a rank without one gets a step in which nothing counts."""
    for source in sources:
        parts = (source.batches(5, part=(rank, world)) for rank in range(world))
        for whole, *shares in zip(source.batches(5), *parts, strict=True):
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
    assert_same_batches(prepared_ahead(source.batches(4), cpu), source.batches(4))
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
    with refused("the shard is gone"):
        next(ahead)


def test_some_of_the_layers_and_nothing_past_the_end(sources: Sources) -> None:
    for source in sources:
        assert list(source.batches(4, start=21)) == []
        batch = next(iter(source.batches(3, layers=[1])))
        assert set(batch.inputs) == set(batch.outputs) == {1}
        assert torch.equal(batch.outputs[1], next(iter(source.batches(3))).outputs[1])
    with refused(r"holds layers \[0, 1\], not 2; cache that layer"):
        next(sources[0].batches(3, layers=[2]))


def test_one_pass_serves_all_layers_and_stops_after_the_deepest(lm: LanguageModel) -> None:
    base, calls = lm.model.base_model, []
    parts = (base, *base.layers)
    hooks = [part.register_forward_pre_hook(lambda part, _: calls.append(parts.index(part))) for part in parts]
    list(ActivationStream(lm, splits()["train"], LAYERS).batches(4))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2] * 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_and_no_more(lm: LanguageModel, tmp_path: Path, dtype: str) -> None:
    source = ActivationCache(build(lm, tmp_path / "cache", dtype=dtype), "held_out")
    batch, exact = (next(side.batches(3)) for side in (source, ActivationStream(lm, splits()["held_out"], LAYERS)))
    assert batch.outputs[1].dtype == torch.float32
    assert torch.equal(batch.outputs[1], exact.outputs[1].to(getattr(torch, dtype)).float())
    assert source.identity()["dtype"] == dtype


# ---- kill and go on


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way, as nothing catches a kill."""


@pytest.mark.parametrize("writes", [1, 3, 5, 6])
def test_a_run_killed_between_shard_and_manifest_goes_on_to_the_same_bytes(
    lm: LanguageModel, cache_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    folder = tmp_path / "cache"
    write = Mock(side_effect=[*[DEFAULT] * writes, Killed], wraps=store.write_json)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", write)
        with pytest.raises(Killed):
            build(lm, folder)
    with refused(r"is unfinished"):
        ActivationCache(folder)
    splits = store.read_json(folder / "manifest.json")["splits"]
    listed = {shard["file"] for entry in splits.values() for shard in entry["shards"]}
    assert len(listed) == writes - 1
    before = times(folder)
    assert contents(build(lm, folder)) == contents(cache_once)
    after = times(folder)
    assert {name for name, time in before.items() if after[name] == time} == listed, "finished shards stay"
    assert build(lm, folder) == folder  # a finished one is left as it is
    assert times(folder) == after


KILLED_CACHE = """
import os, signal, sys
from pathlib import Path
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


def test_kill_9_in_the_middle_of_a_shard(
    lm: LanguageModel, cache_once: Path, model_folder: Path, tmp_path: Path
) -> None:
    killed = run_script(KILLED_CACHE, model_folder, tmp_path / "cache")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = contents(tmp_path / "cache")
    assert [name for name in left if name.endswith(".safetensors")] == [f"train-0000{i}.safetensors" for i in (0, 1)]
    assert any(name.endswith(".tmp") for name in left), "killed too early or too late"
    with refused(r"is unfinished; run the same `lorsa cache` command again"):
        ActivationCache(tmp_path / "cache")
    assert contents(build(lm, tmp_path / "cache")) == contents(cache_once)


# ---- refusals


@pytest.mark.parametrize("place", [3, -1])
def test_a_flipped_bit_is_named_before_its_rows_are_given(cache: Path, place: int) -> None:
    shard = cache / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    batches = ActivationCache(cache).batches(3)
    assert len([next(batches), next(batches)]) == 2
    with refused(r"train-00001.safetensors is damaged"):
        next(batches)


def test_a_missing_a_foreign_a_swapped_and_a_cut_shard_are_named(cache: Path) -> None:
    first, second = cache / "train-00000.safetensors", cache / "train-00001.safetensors"
    shutil.copy(first, cache / "train-00009.safetensors")
    with refused(r"train-00009.safetensors does not belong to this cache"):
        ActivationCache(cache)
    (cache / "train-00009.safetensors").unlink()
    shutil.copy(first, second)
    with refused(r"train-00001.safetensors is damaged"):
        list(ActivationCache(cache).batches(3))
    second.write_bytes(second.read_bytes()[:-1])
    with refused(r"train-00001.safetensors is cut or foreign \(\d+ bytes instead of \d+\)"):
        ActivationCache(cache)
    second.unlink()
    with refused(r"train-00001.safetensors is missing"):
        ActivationCache(cache)


def test_shards_without_a_manifest_are_not_adopted(lm: LanguageModel, cache: Path) -> None:
    (cache / "manifest.json").unlink()
    with refused(r"is not an activation cache \(manifest.json is missing\)"):
        ActivationCache(cache)
    with refused(r"holds held_out-00000.safetensors but no manifest.json; choose an empty"):
        build(lm, cache)


def test_an_unknown_split_and_another_schema(cache: Path) -> None:
    with refused(r"has no split 'test', it has train, held_out"):
        ActivationCache(cache, "test")
    manifest = cache / "manifest.json"
    store.write_json(manifest, store.read_json(manifest) | {"schema_version": 99})
    with refused(r"has schema version 99"):
        ActivationCache(cache)


@pytest.fixture(scope="module")
def others(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LanguageModel]:
    """A model with other weights, and one with another tokenizer."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "other", "llama", seed=1)
    respelled = load_model(model_folder, device="cpu")
    respelled.tokenizer.add_tokens(["lorsa"])
    return load_model(folder, device="cpu"), respelled


def test_the_cache_of_another_model_or_tokenizer_or_bos_policy_is_refused(
    cache_once: Path, others: tuple[LanguageModel, LanguageModel]
) -> None:
    for model, what in zip(others, ("model", "tokenizer"), strict=True):
        with refused(f"was made with another {what}"):
            ActivationCache(cache_once, model=model)
    with refused(r"has BOS policy 'prepend', asked is 'none'"):
        ActivationCache(cache_once, bos_policy="none")


def test_the_folder_of_another_cache_is_not_continued(
    lm: LanguageModel, model_folder: Path, cache: Path, others: tuple[LanguageModel, LanguageModel]
) -> None:
    before = contents(cache)
    half = load_model(model_folder, device="cpu", dtype=torch.bfloat16)

    def train(n: int = 21, **changes: Any) -> dict[str, Any]:
        return {"splits": splits() | {"train": random_sequences(n, CONTEXT, **changes)}}

    for model, change, sentence in (
        (lm, {"dtype": "bfloat16"}, "dtype is 'float32', asked is 'bfloat16'"),
        (lm, {"layers": (0,)}, r"layers is \[0, 1\], asked is \[0\]"),
        (lm, train(seed=7), "train text_sha256 is"),
        (lm, train(bos_policy="none"), "train bos_policy is 'prepend'"),
        (lm, train(22), "train n_sequences is 21, asked is 22"),
        (lm, {"splits": {"train": splits()["train"]}}, "held_out"),
        (others[0], {}, "model"),
        (others[1], {}, "tokenizer_sha256"),
        (half, {}, "model_sha256"),
    ):
        with refused(f"holds another cache: its .*{sentence}"):
            build(model, cache, **change)
    assert contents(cache) == before


def test_settings_that_cannot_be_are_refused_before_anything_is_written(lm: LanguageModel, tmp_path: Path) -> None:
    for change, sentence in (
        ({"dtype": "int8"}, r"dtype 'int8' is not supported"),
        ({"layers": (0, 3)}, r"Layer 3 does not exist"),
        ({"layers": ()}, r"No layer was named"),
    ):
        with refused(sentence):
            build(lm, tmp_path / "cache", **change)
    assert not list(tmp_path.glob("cache/*"))
    with refused(r"Layer 3 does not exist"):
        ActivationStream(lm, splits()["train"], (0, 3))
    (tmp_path / "file").write_text("in the way")
    with refused(r"Cannot write to"):
        build(lm, tmp_path / "file")


def test_the_disk_is_not_filled(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = (1 << 30) + 26 * bytes_per_sequence(D_MODEL, 2, CONTEXT, "float32")
    monkeypatch.setattr(store, "free_bytes", lambda path: needed - 1)
    with refused(r"The activation cache needs 0.0 GB .* free some space, ask for less, or choose"):
        build(lm, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.safetensors"))
    monkeypatch.setattr(store, "free_bytes", lambda path: needed)
    build(lm, tmp_path / "cache")


def test_the_estimate_is_near_what_is_written(lm: LanguageModel, cache_once: Path) -> None:
    estimate = estimate_cache(ActivationStream(lm, splits()["train"], LAYERS), "float32", batch_size=3)
    shards = [file.stat().st_size for file in cache_once.glob("train-*.safetensors")]
    assert estimate.bytes_on_disk <= sum(shards) <= estimate.bytes_on_disk + 1024 * len(shards)
    assert estimate.seconds > 0
    assert estimate.bytes_in_memory > 4 * sum(parameter.numel() for parameter in lm.model.parameters())
    assert "seconds" in estimate.sentence()
