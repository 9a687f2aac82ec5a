"""Documents of the embedded corpus, local files or a Hugging Face dataset; whole documents are held out.

The embedded corpus is an extract of the English Wikipedia and the docstrings of pinned packages.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from lorsa_utils import store
from lorsa_utils.exceptions import UserError
from lorsa_utils.fetch import fetch_wheel_member
from lorsa_utils.prose import module_prose, wiki_prose

CORPUS_VERSION = 3
HELD_OUT_SHARE = 0.1
SPLIT_RULE = (
    "held out when the first 8 bytes of sha256('lorsa-split-0:' + document id), as a fraction of 2^64, are below 0.1"
)

WIKIPEDIA_REQUIREMENT = "gensim==4.4.0"
WIKIPEDIA_WHEEL_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
WIKIPEDIA_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKIPEDIA_MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
# One platform's wheel serves every system: only text is taken from it.
WIKIPEDIA_PIP_ARGS = (
    *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
    *("--implementation", "cp", "--abi", "cp311"),
)

# Dependencies of the kit alone, so that no optional package changes the text. Not plotly and transformers.models,
# which are generated or repeat themselves.
DOCUMENTATION_PACKAGES = (
    *("numpy", "scipy", "pandas", "torch", "transformers", "sympy", "networkx", "mpmath"),
    *("huggingface_hub", "accelerate", "narwhals", "jinja2", "fsspec"),
)
SKIPPED_FOLDERS = {
    *("tests", "test", "testing", "_testing", "_vendor", "vendor", "models", "benchmarks", "array_api_compat"),
    *("_inductor", "_dynamo", "_functorch", "_export", "_refs", "_prims", "_decomp", "_numpy", "_higher_order_ops"),
    "onnx",
}

MIN_WIKIPEDIA_CHARACTERS = 1500
PIECE_CHARACTERS = 8000
MIN_HELD_OUT_CHARACTERS = 500

LICENCES = {
    "wikipedia": "Text of Wikipedia contributors, CC BY-SA 3.0 (GFDL for the parts so marked); fetched, not shipped.",
    "documentation": "Docstrings of the installed packages, each under that package's own licence; "
    "read in place, not shipped.",
    "file": "Supplied by the user.",
    "dataset": "See the card of the dataset.",
}


TextName = str | list[str]
"""`embedded`, a dataset's id, or absolute paths. For display only: comparisons use hashes."""


@dataclass(frozen=True)
class Document:
    """A text, never divided between train and held-out."""

    id: str
    """`wikipedia/<title>`, `documentation/<package>/<module path>`, `file/<name>#<n>` or `dataset/<id>#<n>`."""
    source: str
    """The first part of `id`."""
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents split into two parts that share none."""

    train: list[Document]
    held_out: list[Document]
    """About a tenth of the text."""
    manifest: dict[str, Any]
    """Counts, share, sha256 and licence per source; versions, split rule; `sha256` of the whole."""
    origin: TextName = "embedded"


def load_corpus(
    text: Sequence[str | Path] | None = None, dataset: str | None = None, *, max_tokens: int | None = None
) -> Corpus:
    """Local files, a Hugging Face dataset, or else the embedded corpus.

    Raises:
        UserError: both are given, or the text cannot be read.
    """
    if text and dataset:
        raise UserError("Give either text files or a dataset, not both.")
    if text:
        return text_corpus(text)
    return hub_corpus(dataset, max_tokens=max_tokens) if dataset else embedded_corpus()


# --- splitting, de-duplicating, describing ---------------------------------------------------------------------------


def _split_value(document: Document) -> float:
    digest = hashlib.sha256(f"lorsa-split-0:{document.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents in the given order, neither empty; a single document is all train."""
    values = [_split_value(document) for document in documents]
    held_out_ids = {document.id for document, value in zip(documents, values, strict=True) if value < HELD_OUT_SHARE}
    ranked = sorted(documents, key=_split_value)
    if len(documents) > 1:
        held_out_ids.add(ranked[0].id)
    if documents:
        held_out_ids.discard(ranked[-1].id)
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        parts[document.id in held_out_ids].append(document)
    return parts


def drop_near_duplicates(documents: Sequence[Document], threshold: float = 0.7, shingle: int = 5) -> list[Document]:
    """Drop documents that resemble an earlier one: estimated Jaccard similarity of word shingles at least `threshold`.

    MinHash with locality-sensitive hashing (Broder 1997), seeded: the result depends only on the texts and their
    order.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=64)
    signatures: dict[int, Any] = {}
    for number, document in enumerate(documents):
        words = re.findall(r"\w+", document.text.lower())
        shingles = {" ".join(words[i : i + shingle]).encode() for i in range(max(1, len(words) - shingle + 1))}
        signature = MinHash(num_perm=64, seed=1, hashfunc=zlib.crc32)
        signature.update_batch(sorted(shingles))
        if all(signatures[other].jaccard(signature) < threshold for other in index.query(signature)):
            signatures[number] = signature
            index.insert(number, signature)
    return [documents[number] for number in signatures]


def documents_sha256(documents: Iterable[Document]) -> str:
    """Hash of ids and texts, whatever their order."""
    return store.sha256_json(
        sorted([document.id, hashlib.sha256(document.text.encode()).hexdigest()] for document in documents)
    )


def _corpus(documents: Sequence[Document], origin: TextName, **about: Any) -> Corpus:
    train, held_out = split_documents(documents)
    total = _characters(documents)
    sources: dict[str, Any] = {}
    for source in dict.fromkeys(document.source for document in [*train, *held_out]):
        members, held = ([d for d in side if d.source == source] for side in (documents, held_out))
        sources[source] = {
            "documents": len(members),
            "characters": _characters(members),
            "share": round(_characters(members) / max(total, 1), 4),
            "held_out_documents": len(held),
            "held_out_characters": _characters(held),
            "sha256": documents_sha256(members),
            "licence": LICENCES[source],
        }
    manifest = {"version": CORPUS_VERSION, "documents": len(documents), "characters": total, "sources": sources}
    manifest |= {"split": SPLIT_RULE, **about, "sha256": documents_sha256(documents)}
    return Corpus(train, held_out, manifest, origin)


def _characters(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


# --- the embedded corpus ---------------------------------------------------------------------------------------------


def wikipedia_documents(extract: str | Path) -> list[Document]:
    """Articles of a MediaWiki XML dump (bz2) with at least 1,500 characters of prose, in the dump's order."""
    documents = []
    with bz2.open(extract) as handle:
        for title, markup in tqdm(_pages(handle), desc="Wikipedia prose", unit=" articles", mininterval=1.0):
            if markup.lstrip().lower().startswith("#redirect") or title.lower().startswith("list of"):
                continue
            text = wiki_prose(markup)
            if len(text) >= MIN_WIKIPEDIA_CHARACTERS:
                documents.append(Document(f"wikipedia/{title}", "wikipedia", text))
    return documents


def _pages(handle: Any) -> Iterator[tuple[str, str]]:
    """Title and markup of articles (namespace 0)."""
    for _, element in ElementTree.iterparse(handle):
        if element.tag.rpartition("}")[2] == "page":
            if element.findtext("{*}ns", "0") == "0":
                yield element.findtext("{*}title", ""), element.findtext("{*}revision/{*}text", "")
            element.clear()


def documentation_documents() -> tuple[list[Document], dict[str, str]]:
    """Docstring prose of `DOCUMENTATION_PACKAGES`, one document per module, and the installed versions.

    Modules are parsed, never imported. Paragraphs seen in an earlier module are left out, because docstrings repeat
    each other. A missing package is left out with a warning.
    """
    documents: list[Document] = []
    versions: dict[str, str] = {}
    seen: set[str] = set()
    for package in tqdm(DOCUMENTATION_PACKAGES, desc="Documentation prose", unit=" packages"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            warnings.warn(f"{package} is not installed, so its documentation is missing from the corpus.", stacklevel=2)
            continue
        versions[package] = _version(package)
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (text := module_prose(path, seen)):
                documents.append(Document(f"documentation/{package}/{relative.as_posix()}", "documentation", text))
    return documents, versions


def embedded_corpus() -> Corpus:
    """Human-written prose of Wikipedia and documentation, the same for the same package versions.

    Built once (pip fetches 30 MB), then read from `data/cache/corpus/<key>/`. Building warns when a text is not the
    one pinned in `data/corpus/manifest.json`, as with other package versions.

    Raises:
        UserError: the extract cannot be fetched or its hash is wrong.
    """
    cleaners = ("mwparserfromhell", "datasketch")
    versions = {package: _version(package) for package in (*DOCUMENTATION_PACKAGES, *cleaners)}
    key = store.sha256_json({"version": CORPUS_VERSION, "wikipedia": WIKIPEDIA_MEMBER_SHA256, "versions": versions})[
        :16
    ]
    folder = store.data_dir() / "cache" / "corpus" / key
    if corpus := _read_corpus(folder):
        return corpus
    store.require_writable(folder)
    with FileLock(folder / ".lock"):  # a second process waits, then reads what the first has built
        if corpus := _read_corpus(folder):
            return corpus
        wikipedia = wikipedia_documents(_wikipedia_extract())  # first, because it fails without a network
        documentation, installed = documentation_documents()
        documents = drop_near_duplicates([*wikipedia, *documentation])
        corpus = _corpus(documents, "embedded", versions=installed | {name: versions[name] for name in cleaners})
        _warn_when_unpinned(corpus.manifest)
        _write_corpus(folder, corpus)
    return corpus


def _version(package: str) -> str:
    """Without a local part such as `+cpu`; empty when not installed."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _wikipedia_extract() -> Path:
    return fetch_wheel_member(
        WIKIPEDIA_REQUIREMENT,
        WIKIPEDIA_WHEEL_SHA256,
        WIKIPEDIA_MEMBER,
        WIKIPEDIA_MEMBER_SHA256,
        store.data_dir() / "cache" / "corpus" / Path(WIKIPEDIA_MEMBER).name,
        pip_args=WIKIPEDIA_PIP_ARGS,
    )


def pinned_manifest() -> dict[str, Any]:
    """`data/corpus/manifest.json`; empty where the package is installed without it."""
    path = store.CHECKOUT / "data" / "corpus" / "manifest.json"
    return dict(store.read_json(path)) if path.is_file() else {}


def _warn_when_unpinned(manifest: Mapping[str, Any]) -> None:
    expected = pinned_manifest()
    for source, description in manifest["sources"].items():
        pinned = expected.get("sources", {}).get(source)
        if pinned and pinned["sha256"] != description["sha256"]:
            versions = expected["versions"]
            differing = [name for name, version in manifest["versions"].items() if versions.get(name) != version]
            warnings.warn(
                f"The {source} part of the embedded text is not the pinned one (versions that differ: "
                f"{', '.join(differing) or 'none'}); numbers will differ a little from the expected ones. "
                "Install with constraints.txt to get the pinned text.",
                stacklevel=3,
            )


def _write_corpus(folder: Path, corpus: Corpus) -> None:
    """The manifest comes last: it marks a complete corpus."""
    rows = [
        {"id": document.id, "source": document.source, "split": split, "text": document.text}
        for split, documents in (("train", corpus.train), ("held_out", corpus.held_out))
        for document in documents
    ]
    store.write_text(folder / "documents.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    store.write_json(folder / "manifest.json", corpus.manifest)


def _read_corpus(folder: Path) -> Corpus | None:
    """None if there is none, or its text does not match its manifest."""
    if not (folder / "manifest.json").is_file() or not (folder / "documents.jsonl").is_file():
        return None
    parts: dict[str, list[Document]] = {"train": [], "held_out": []}
    try:
        manifest = dict(store.read_json(folder / "manifest.json"))
        for line in (folder / "documents.jsonl").read_text(encoding="utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            parts[row["split"]].append(Document(row["id"], row["source"], row["text"]))
    except (UserError, ValueError, KeyError):
        return None
    corpus = Corpus(parts["train"], parts["held_out"], manifest)
    return corpus if documents_sha256([*corpus.train, *corpus.held_out]) == manifest.get("sha256") else None


# --- text of the user's choice ---------------------------------------------------------------------------------------


def text_documents(paths: Sequence[str | Path], size: int = PIECE_CHARACTERS) -> list[Document]:
    """Documents of UTF-8 files: text cut at blank lines near `size` characters, or one per line of `.jsonl`.

    A folder stands for all .txt, .md and .jsonl files below it, sorted by path.

    Raises:
        UserError: a file is missing, empty or not text.
    """
    files = [file for path in paths for file in _text_files(Path(path))]
    if not files:
        raise UserError("No text was given; name at least one file or folder.")
    names = Counter(file.name for file in files)
    documents = []
    for file in dict.fromkeys(files):
        name = file.name if names[file.name] == 1 else file.as_posix()
        texts = _jsonl_texts(file) if file.suffix == ".jsonl" else _cut_text(_read_text(file), size)
        documents += [Document(f"file/{name}#{number}", "file", text) for number, text in enumerate(texts)]
    return documents


def text_corpus(paths: Sequence[str | Path]) -> Corpus:
    """A corpus of local files (see `text_documents`).

    A text too short for two documents is cut finer, so that a tenth can be held out; a short paragraph is all train.
    """
    documents = text_documents(paths)
    if len(documents) == 1:
        documents = text_documents(paths, size=max(MIN_HELD_OUT_CHARACTERS, len(documents[0].text) // 10))
    return _corpus(documents, [str(Path(path).absolute()) for path in paths])


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"There is no file or folder {path}; check the path.")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md", ".jsonl") and file.is_file())
    if not files:
        raise UserError(f"The folder {path} holds no .txt, .md or .jsonl file; name the text files themselves.")
    return files


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check that it may be read.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 or name a text file."
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file (it holds NUL bytes); name a text file.")
    if not text.strip():
        raise UserError(f"{path} is empty; name a file that holds text.")
    return text


def _jsonl_texts(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'Line {number} of {path} is not a JSON object with a "text" field; write one such object per line.'
            ) from error
        if not isinstance(text, str):
            raise UserError(
                f'The "text" field in line {number} of {path} is not a string; write one object with a text per line.'
            )
        texts.append(text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} is empty; name a file that holds text.")
    return texts


def _cut_text(text: str, size: int) -> list[str]:
    """Cut at blank lines into parts near `size` characters; a paragraph over twice that is cut by `_cut_point`."""
    pieces: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        while len(paragraph) > 2 * size:
            at = _cut_point(paragraph[:size])
            pieces += [current, paragraph[:at]]
            current, paragraph = "", paragraph[at:]
        if current and len(current) + 2 + len(paragraph) > size:
            pieces.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [piece.strip("\n") for piece in [*pieces, current] if piece.strip()]


def _cut_point(window: str) -> int:
    """After the last line end, else sentence end, else space in the second half; else the end."""
    for mark in ("\n", ". ", " "):
        at = window.rfind(mark)
        if at > len(window) // 2:
            return at + len(mark)
    return len(window)


def hub_corpus(
    dataset_id: str,
    *,
    text_field: str = "text",
    split: str = "train",
    max_characters: int = 20_000_000,
    max_tokens: int | None = None,
    **options: Any,
) -> Corpus:
    """A corpus of a Hugging Face dataset, streamed, or of a local folder of .parquet or .jsonl files.

    Rows are read up to `max_characters`, or 6 characters per token of `max_tokens` if that is less. Failed reads are
    retried with exponential waits and resume at the same row. Code in a dataset is never run. `options` are those of
    `datasets.load_dataset`, such as `name` and `revision`.

    Raises:
        UserError: `datasets` is not installed, the dataset or field does not exist, or the network fails.
    """
    limit = min(max_characters, 6 * (max_tokens or max_characters))
    documents: list[Document] = []
    characters = 0
    with tqdm(desc=f"Reading {dataset_id}", unit=" characters", unit_scale=True) as progress:
        rows = resumable(_dataset_opener(dataset_id, {"split": split, **options}), dataset_id)
        for number, row in enumerate(rows):
            text = row.get(text_field)
            if not isinstance(text, str):
                fields = ", ".join(map(str, row))
                raise UserError(
                    f"Rows of {dataset_id} have no text in {text_field!r}; choose text_field among {fields}."
                )
            if text.strip():
                documents.append(Document(f"dataset/{dataset_id}#{number}", "dataset", text))
                characters += len(text)
                progress.update(len(text))
            if characters >= limit:
                break
    if not documents:
        raise UserError(f"{dataset_id} ({split}) holds no text; choose another split or dataset.")
    about = {"id": dataset_id, "split": split, "text_field": text_field, **options}
    return _corpus(drop_near_duplicates(documents), dataset_id, dataset=about)


def _dataset_opener(dataset_id: str, options: Mapping[str, Any]) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "Hugging Face datasets need the package `datasets`; install it with `pip install datasets`."
        ) from error

    def open_at(position: int) -> Iterator[Mapping[str, Any]]:
        folder = Path(dataset_id)
        if not folder.is_dir():
            return iter(datasets.load_dataset(dataset_id, streaming=True, **options).skip(position))
        for kind, ending in (("parquet", ".parquet"), ("json", ".jsonl")):
            if files := sorted(str(file) for file in folder.rglob(f"*{ending}")):
                return iter(datasets.load_dataset(kind, data_files=files, split="train", streaming=True).skip(position))
        raise UserError(f"The folder {folder} holds no .parquet or .jsonl file; choose another folder.")

    return open_at


def resumable(
    open_at: Callable[[int], Iterator[Any]],
    name: str,
    *,
    attempts: int = 6,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Any]:
    """Iterate over `open_at(0)`; when a read fails, wait (1, 2, 4, ... s) and resume with `open_at(rows read so far)`.

    Raises:
        UserError: `attempts` reads in a row failed, or waiting cannot help.
    """
    position, failures = 0, 0
    rows: Iterator[Any] | None = None
    while True:
        try:
            rows = open_at(position) if rows is None else rows
            row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            failures += 1
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not _is_transient(error):
                raise UserError(
                    f"Cannot read {name} ({reason}); check its name, split, config and revision."
                ) from error
            if failures >= attempts:
                raise UserError(
                    f"Reading {name} failed {attempts} times at row {position} ({reason}); "
                    "check the network and run again."
                ) from error
            wait = 2.0 ** (failures - 1)
            tqdm.write(f"Reading {name} failed ({reason}); trying again in {wait:.0f} s.", file=sys.stderr)
            sleep(wait)
            rows = None
        else:
            position, failures = position + 1, 0
            yield row


def _is_transient(error: BaseException) -> bool:
    """The network's failures may go away; a wrong name, missing rights or a broken file will not."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if refused or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return False
    networks = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub")
    is_networks = isinstance(error, OSError) or type(error).__module__.split(".")[0] in networks
    return is_networks and "Offline" not in type(error).__name__
