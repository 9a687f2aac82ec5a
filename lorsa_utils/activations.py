"""What attention layers read and write, computed (stream) or from disk (cache), behind one iterator interface.

A cache folder holds `manifest.json` and shards `<split>-00000.safetensors` with `tokens`, `mask` and, per layer,
`<layer>.input` and `<layer>.output`. The manifest lists a shard, with size and sha256, only when it is in place: a
killed run resumes after the last listed shard, and a truncated, corrupted or foreign one is refused by name.
"""

from __future__ import annotations

import bisect
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from lorsa_utils import store
from lorsa_utils.config import SCHEMA_VERSION
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences, TextName

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 64 << 20

Part = tuple[int, int]
"""Rank and number of the processes that share every batch; (0, 1) is one process alone."""


class ActivationBatch(NamedTuple):
    """Sequences with what the layers asked for read and wrote."""

    tokens: Tensor
    """[batch, length]"""
    mask: Tensor
    """Bool [batch, length], True where the token counts (no BOS, no padding)."""
    inputs: dict[int, Tensor]
    """What attention reads in each layer, [batch, length, d_model]."""
    outputs: dict[int, Tensor]
    """What it writes."""
    whole_mask: Tensor
    """Of the whole batch, shared by all processes, [whole batch, length]; on the CPU."""

    def up_to(self, n_tokens: int, part: Part = (0, 1)) -> ActivationBatch:
        """Mask all but the first `n_tokens` counted tokens of the whole batch."""
        if int(self.whole_mask.sum()) <= n_tokens:
            return self
        whole = self.whole_mask & (self.whole_mask.flatten().cumsum(0) <= n_tokens).view_as(self.whole_mask)
        return self._replace(mask=own_rows(whole, part)[1].to(self.mask.device), whole_mask=whole)


class ActivationSource(Protocol):
    """Interface of `ActivationStream` and `ActivationCache`."""

    layers: tuple[int, ...]
    n_sequences: int
    n_tokens: int
    context: int

    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        """One epoch in stored order from sequence `start`; the last batch may be smaller.

        `part` (rank, world) keeps sequences rank, rank + world, ... of each batch. Where there are none, it keeps the
        first one with a mask of False, so that every rank makes every step.
        """

    def identity(self) -> dict[str, Any]:
        """Model, text, BOS policy and dtype; equal for sources of the same batches."""


class ActivationStream(ActivationSource):
    """Activations computed on demand; one model pass serves all layers and stops after the deepest."""

    def __init__(
        self, model: LanguageModel, sequences: Sequences, layers: Sequence[int], text: TextName | None = None
    ) -> None:
        """`text` names the origin of the sequences in `identity`; UserError if a layer is out of range."""
        for layer in layers:
            model.module_path(layer)  # refuses a layer that is not there
        self.model, self.sequences, self.text = model, sequences, text
        self.layers = tuple(sorted(set(layers)))
        self.n_sequences, self.context = sequences.tokens.shape
        self.n_tokens = sequences.n_tokens

    @override
    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        chosen = self.layers if layers is None else tuple(layers)
        for first in range(start, self.n_sequences, batch_size):
            whole = self.sequences.mask[first : first + batch_size]
            rows, mask = own_rows(whole, part)
            tokens = self.sequences.tokens[first : first + batch_size][rows].to(self.model.device, torch.long)
            captured = self.model.capture(tokens, chosen)
            inputs, outputs = ({layer: pair[side] for layer, pair in captured.items()} for side in (0, 1))
            yield ActivationBatch(tokens, mask.to(self.model.device), inputs, outputs, whole)

    @override
    def identity(self) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {**source_identity(self.model, self.sequences, self.text), "dtype": dtype}


def prepared_ahead(batches: Iterator[ActivationBatch], device: torch.device) -> Iterator[ActivationBatch]:
    """The same batches, two of them prepared in a thread while the caller works; on a GPU in its own stream."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare() -> tuple[ActivationBatch, Any] | None:
        with torch.cuda.stream(stream):
            if (batch := next(batches, None)) is None:
                return None
            return _move(batch, device), stream.record_event() if stream else None

    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(prepare) for _ in range(2))
        while (ready := coming.popleft().result()) is not None:
            coming.append(thread.submit(prepare))
            batch, prepared = ready
            if stream:
                torch.cuda.current_stream(device).wait_event(prepared)
                for tensor in (batch.tokens, batch.mask, *batch.inputs.values(), *batch.outputs.values()):
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield batch


def _move(batch: ActivationBatch, device: torch.device) -> ActivationBatch:
    def move(tensor: Tensor) -> Tensor:
        from_memory = device.type == "cuda" and tensor.device.type == "cpu"
        return (tensor.pin_memory() if from_memory else tensor).to(device, non_blocking=True)

    inputs, outputs = (
        {layer: move(tensor) for layer, tensor in side.items()} for side in (batch.inputs, batch.outputs)
    )
    return ActivationBatch(move(batch.tokens), move(batch.mask), inputs, outputs, batch.whole_mask)


def own_rows(whole_mask: Tensor, part: Part) -> tuple[slice, Tensor]:
    """Rows of a batch that belong to a part, and their mask; see `ActivationSource.batches`."""
    rank, world = part
    if rank < len(whole_mask):
        return slice(rank, None, world), whole_mask[rank::world]
    return slice(0, 1), torch.zeros_like(whole_mask[:1])


def source_identity(model: LanguageModel, sequences: Sequences, text: TextName | None = None) -> dict[str, Any]:
    """Model, tokenizer and text that activations come from."""
    named = {} if text is None else {"text": text if isinstance(text, str) else list(text)}
    return named | {
        "model": model.name,
        "revision": model.revision,
        "model_sha256": model.fingerprint,
        "tokenizer_sha256": model.tokenizer_fingerprint,
        "text_sha256": sequences.sha256,
        "bos_policy": sequences.bos_policy,
        "context": int(sequences.tokens.shape[1]),
    }


class CacheEstimate(NamedTuple):
    """What a cache will cost."""

    bytes_on_disk: int
    bytes_in_memory: int
    seconds: float

    def sentence(self) -> str:
        """Human-readable."""
        time = f"{self.seconds / 60:.1f} minutes" if self.seconds >= 60 else f"{self.seconds:.0f} seconds"
        return f"{self.bytes_on_disk / 1e9:.2f} GB on disk, {self.bytes_in_memory / 1e9:.2f} GB of memory, about {time}"


def bytes_per_sequence(d_model: int, n_layers: int, context: int, dtype: str) -> int:
    """Bytes of a cached sequence: input and output of every layer, int32 tokens, mask."""
    return context * (n_layers * 2 * d_model * DTYPES[dtype].itemsize + 5)


def estimate_cache(stream: ActivationStream, dtype: str, batch_size: int = 8, start: int = 0) -> CacheEstimate:
    """Of the sequences from `start` on: disk and memory by arithmetic, time by running one batch."""
    began = time.perf_counter()
    probe = next(stream.batches(batch_size))
    left = stream.n_sequences - start
    seconds = (time.perf_counter() - began) / len(probe.tokens) * left
    one = bytes_per_sequence(stream.model.d_model, len(stream.layers), stream.context, dtype)
    weights = sum(parameter.nbytes for parameter in stream.model.model.parameters())
    # While one shard is being filled its pieces and their concatenation exist together.
    memory = weights + 2 * max(SHARD_BYTES, one * batch_size) + 4 * one * batch_size
    return CacheEstimate(one * left, memory, seconds)


def build_cache(
    model: LanguageModel,
    splits: Mapping[str, Sequences],
    layers: Sequence[int],
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    batch_size: int = 8,
    progress: bool = True,
    text: TextName | None = None,
) -> Path:
    """Write activations for every split (`train`, `held_out`), or resume a killed run.

    bfloat16 takes half the disk space of float32, with a relative rounding error of at most 2^-8. `text` names the
    origin of the sequences in the manifest.

    Raises:
        UserError: the folder holds a cache of something else, cannot be written, or the disk is too small.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}.")
    path = store.require_writable(folder)
    if not layers:
        raise UserError("No layer was named; give at least one to cache.")
    streams = {split: ActivationStream(model, sequences, layers, text) for split, sequences in splits.items()}
    store.remove_leftovers(path)
    entries: dict[str, Any] = {}
    for split, stream in streams.items():
        counts = {"n_sequences": stream.n_sequences, "n_tokens": stream.n_tokens}
        entries[split] = {"source": source_identity(model, stream.sequences, text), **counts, "shards": []}
    settings = {"layers": sorted(set(layers)), "d_model": model.d_model, "dtype": dtype, "splits": entries}
    manifest = _open_or_start(path, {"schema_version": SCHEMA_VERSION, "complete": False, **settings})
    if manifest["complete"]:
        return path
    total = CacheEstimate(0, 0, 0.0)
    for split, stream in streams.items():
        if (start := _written(manifest, split)) < stream.n_sequences:
            disk, memory, seconds = estimate_cache(stream, dtype, batch_size, start)
            total = CacheEstimate(total[0] + disk, max(total[1], memory), total[2] + seconds)
    store.require_free_bytes(path, total.bytes_on_disk, "The activation cache")
    if progress:
        tqdm.write(f"Caching layers {', '.join(map(str, manifest['layers']))}: {total.sentence()}.")
    for split, stream in streams.items():
        _write_split(path, manifest, split, stream, batch_size, progress)
    manifest["complete"] = True
    store.write_json(path / "manifest.json", manifest)
    return path


def _open_or_start(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (path / "manifest.json").is_file():
        if strangers := sorted(path.glob("*.safetensors")):
            raise UserError(
                f"{path} holds {strangers[0].name} but no manifest.json; choose an empty folder for the cache."
            )
        store.write_json(path / "manifest.json", wanted)
        return wanted
    manifest: dict[str, Any] = store.read_json(path / "manifest.json")
    old, new = _without_progress(manifest), _without_progress(wanted)
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if any(not name.endswith((" model", " revision")) for name in differing):
        name = differing[0]
        raise UserError(
            f"{path} holds another cache: its {name} is {old.get(name)!r}, asked is {new.get(name)!r}; "
            "choose another --out or delete that folder."
        )
    return manifest


def _without_progress(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, without what changes while the cache is written."""
    flat = {key: value for key, value in manifest.items() if key not in ("splits", "complete")}
    for split, entry in manifest.get("splits", {}).items():
        flat.update({f"{split} {key}": value for key, value in entry["source"].items() if key != "text"})
        flat[f"{split} n_sequences"] = entry["n_sequences"]
    return flat


def _written(manifest: Mapping[str, Any], split: str) -> int:
    return sum(shard["n_sequences"] for shard in manifest["splits"][split]["shards"])


def _write_split(
    path: Path, manifest: dict[str, Any], split: str, stream: ActivationStream, batch_size: int, progress: bool
) -> None:
    dtype, shards, start = DTYPES[manifest["dtype"]], manifest["splits"][split]["shards"], _written(manifest, split)
    one = bytes_per_sequence(manifest["d_model"], len(stream.layers), stream.context, manifest["dtype"])
    per_shard = max(batch_size, SHARD_BYTES // one // batch_size * batch_size)
    pending: list[dict[str, Tensor]] = []
    bar = tqdm(total=stream.n_sequences, initial=start, unit="seq", desc=f"cache {split}", disable=not progress)
    for batch in stream.batches(batch_size, start):
        pieces = {"tokens": batch.tokens.to(torch.int32), "mask": batch.mask}
        for layer in stream.layers:
            pieces[f"{layer}.input"] = batch.inputs[layer].to(dtype)
            pieces[f"{layer}.output"] = batch.outputs[layer].to(dtype)
        pending.append({name: piece.cpu() for name, piece in pieces.items()})
        bar.update(len(batch.tokens))
        start += len(batch.tokens)
        if sum(len(piece["tokens"]) for piece in pending) < per_shard and start < stream.n_sequences:
            continue
        tensors, file = _join(pending), path / f"{split}-{len(shards):05d}.safetensors"
        pending = []
        store.write_tensors(file, tensors)
        counts = {"n_sequences": len(tensors["tokens"]), "n_tokens": int(tensors["mask"].sum())}
        shards.append({"file": file.name, **counts, "bytes": file.stat().st_size, "sha256": store.sha256_file(file)})
        store.write_json(path / "manifest.json", manifest)
    bar.close()


class ActivationCache(ActivationSource):
    """One split of a finished cache: float32, on the CPU. Shards are verified before their first use."""

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        model: LanguageModel | None = None,
        bos_policy: str | None = None,
    ) -> None:
        """`model` and `bos_policy`, when given, must be those of the cache.

        Raises:
            UserError: not a cache, unfinished, damaged, of another model, tokenizer or BOS policy.
        """
        self.folder, self.split = Path(folder), split
        if not (self.folder / "manifest.json").is_file():
            raise UserError(
                f"{folder} is not an activation cache (manifest.json is missing); "
                f"make one with `lorsa cache --out {folder}`."
            )
        manifest = store.read_json(self.folder / "manifest.json")
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(f"{folder} has schema version {version}, this version reads {SCHEMA_VERSION}; cache again.")
        if split not in manifest["splits"]:
            raise UserError(
                f"{folder} has no split {split!r}, it has {', '.join(manifest['splits'])}; cache again with it."
            )
        if not manifest["complete"]:
            raise UserError(
                f"{folder} is unfinished; run the same `lorsa cache` command again, it goes on where it stopped."
            )
        entry = manifest["splits"][split]
        self.dtype, self.layers = str(manifest["dtype"]), tuple(manifest["layers"])
        self.source: dict[str, Any] = entry["source"]
        self.n_sequences, self.n_tokens = int(entry["n_sequences"]), int(entry["n_tokens"])
        self.context = int(self.source["context"])
        self.shards: list[dict[str, Any]] = entry["shards"]
        self._verified: set[str] = set()
        listed = {shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]}
        if strangers := sorted(file.name for file in self.folder.glob("*.safetensors") if file.name not in listed):
            raise UserError(f"{self.folder / strangers[0]} does not belong to this cache; move it away.")
        for shard in self.shards:
            file = self.folder / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                state = "missing" if size is None else f"cut or foreign ({size} bytes instead of {shard['bytes']})"
                raise UserError(f"{file} is {state}; delete {self.folder} and cache again.")
        if model is not None:
            for what, sha256 in (("model", model.fingerprint), ("tokenizer", model.tokenizer_fingerprint)):
                if self.source[f"{what}_sha256"] != sha256:
                    raise UserError(
                        f"{self.folder} was made with another {what} ({self.source['model']}) than {model.name}; "
                        "cache again with it."
                    )
        if bos_policy is not None and self.source["bos_policy"] != bos_policy:
            raise UserError(
                f"{self.folder} has BOS policy {self.source['bos_policy']!r}, asked is {bos_policy!r}; cache again."
            )

    def _open_shard(self, shard: Mapping[str, Any]) -> Path:
        file = self.folder / shard["file"]
        if shard["file"] not in self._verified:
            if not file.is_file() or store.sha256_file(file) != shard["sha256"]:
                raise UserError(
                    f"{file} is damaged (its sha256 is not the one in manifest.json); "
                    f"delete {self.folder} and cache again."
                )
            self._verified.add(shard["file"])
        elif hasattr(os, "posix_fadvise"):
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    @override
    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        chosen = self.layers if layers is None else tuple(layers)
        if missing := sorted(set(chosen) - set(self.layers)):
            raise UserError(f"{self.folder} holds layers {list(self.layers)}, not {missing[0]}; cache that layer.")
        rows: dict[str, Tensor] = {}
        for piece in self._pieces(chosen, start, batch_size):
            rows = _join([rows, piece]) if rows else piece
            if (n := len(rows["tokens"])) >= batch_size:
                yield _to_batch({name: side[:batch_size] for name, side in rows.items()}, chosen, part)
                rows = {name: side[batch_size:] for name, side in rows.items()} if n > batch_size else {}
        if rows:
            yield _to_batch(rows, chosen, part)

    def _pieces(self, layers: Sequence[int], start: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """At most `batch_size` sequences, within shards; meanwhile the next shard is verified or prefetched."""
        names = ["tokens", "mask", *(f"{layer}.{side}" for layer in layers for side in ("input", "output"))]
        ends = list(itertools.accumulate(shard["n_sequences"] for shard in self.shards))
        first = bisect.bisect_right(ends, start)
        with ThreadPoolExecutor(1) as reader:
            opened = [reader.submit(self._open_shard, shard) for shard in self.shards[first : first + 1]]
            for number, end in enumerate(ends[first:], first + 1):
                file = opened.pop().result()
                opened = [reader.submit(self._open_shard, shard) for shard in self.shards[number : number + 1]]
                n = self.shards[number - 1]["n_sequences"]
                with safe_open(file, framework="pt") as handle:
                    slices = {name: handle.get_slice(name) for name in names}
                    for begin in range(max(0, start - end + n), n, batch_size):
                        yield {name: part[begin : begin + batch_size] for name, part in slices.items()}

    @override
    def identity(self) -> dict[str, Any]:
        return {**self.source, "dtype": self.dtype}


def _join(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return pieces[0] if len(pieces) == 1 else {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _to_batch(tensors: Mapping[str, Tensor], layers: Sequence[int], part: Part) -> ActivationBatch:
    rows, mask = own_rows(tensors["mask"], part)
    return ActivationBatch(
        tensors["tokens"][rows].long(),
        mask,
        {layer: tensors[f"{layer}.input"][rows].float() for layer in layers},
        {layer: tensors[f"{layer}.output"][rows].float() for layer in layers},
        tensors["mask"],
    )
