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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from lorsa_utils import store
from lorsa_utils.exceptions import UserError
from lorsa_utils.fetch import WheelFile
from lorsa_utils.prose import module_prose, wiki_prose

CORPUS_VERSION = 3
HELD_OUT_SHARE = 0.1
SPLIT_RULE = (
    "held out when the first 8 bytes of sha256('lorsa-split-0:' + document id), as a fraction of 2^64, are below 0.1"
)

WIKIPEDIA = WheelFile(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # One platform's wheel serves every system: only text is taken from it.
    ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
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
DATASET_CHARACTERS = 20_000_000
MIN_HELD_OUT_CHARACTERS = 500
SIMILARITY = 0.7
READS = 6
"""Attempts at one row of a dataset."""

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
    return int(hashlib.sha256(f"lorsa-split-0:{document.id}".encode()).hexdigest()[:16], 16) / 2.0**64


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents in the given order, neither empty; a single document is all train."""
    ranked = sorted(documents, key=_split_value)
    n_held_out = sum(_split_value(document) < HELD_OUT_SHARE for document in documents)
    n_held_out = min(max(n_held_out, 1), len(documents) - 1)
    held_out_ids = {document.id for document in ranked[:n_held_out]}
    train = [document for document in documents if document.id not in held_out_ids]
    return train, [document for document in documents if document.id in held_out_ids]


def drop_near_duplicates(documents: Sequence[Document]) -> list[Document]:
    """Drop documents that resemble an earlier one: estimated Jaccard similarity of 5-word shingles at least 0.7.

    MinHash with locality-sensitive hashing (Broder 1997), seeded: the result depends only on the texts and their
    order.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILARITY, num_perm=64)
    signatures: dict[int, Any] = {}
    for number, document in enumerate(documents):
        words = re.findall(r"\w+", document.text.lower())
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        signature = MinHash(num_perm=64, seed=1, hashfunc=zlib.crc32)
        signature.update_batch(sorted(shingles))
        if all(signatures[other].jaccard(signature) < SIMILARITY for other in index.query(signature)):
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
            if not title.lower().startswith("list of") and len(text := wiki_prose(markup)) >= MIN_WIKIPEDIA_CHARACTERS:
                documents.append(Document(f"wikipedia/{title}", "wikipedia", text))
    return documents


def _pages(handle: Any) -> Iterator[tuple[str, str]]:
    """Title and markup of articles (namespace 0)."""
    for _, element in ElementTree.iterparse(handle):
        if element.tag.rpartition("}")[2] == "page":
            if element.findtext("{*}ns", "0") == "0":
                yield element.findtext("{*}title", ""), element.findtext("{*}revision/{*}text", "")
            element.clear()


def documentation_documents() -> list[Document]:
    """Docstring prose of `DOCUMENTATION_PACKAGES`, one document per module.

    Modules are parsed, never imported. Paragraphs seen in an earlier module are left out, because docstrings repeat
    each other. A missing package is left out with a warning.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    for package in tqdm(DOCUMENTATION_PACKAGES, desc="Documentation prose", unit=" packages"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            warnings.warn(f"{package} is not installed, so its documentation is missing from the corpus.", stacklevel=2)
            continue
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (text := module_prose(path, seen)):
                documents.append(Document(f"documentation/{package}/{relative.as_posix()}", "documentation", text))
    return documents


def embedded_corpus() -> Corpus:
    """Human-written prose of Wikipedia and documentation, the same for the same package versions.

    Built once (pip fetches 30 MB), then read from `data/cache/corpus/<key>/`. Building warns when a text is not the
    one pinned in `data/corpus/manifest.json`, as with other package versions.

    Raises:
        UserError: the extract cannot be fetched or its hash is wrong.
    """
    versions = {package: _version(package) for package in (*DOCUMENTATION_PACKAGES, "mwparserfromhell", "datasketch")}
    key = store.sha256_json({"version": CORPUS_VERSION, "wikipedia": WIKIPEDIA.member_sha256, "versions": versions})
    folder = store.data_dir() / "cache" / "corpus" / key[:16]
    if corpus := _read_corpus(folder, versions):
        return corpus
    store.require_writable(folder)
    with FileLock(folder / ".lock"):  # a second process waits, then reads what the first has built
        if corpus := _read_corpus(folder, versions):
            return corpus
        extract = WIKIPEDIA.fetch(folder.parent / Path(WIKIPEDIA.member).name)  # first: it fails without a network
        documents = drop_near_duplicates([*wikipedia_documents(extract), *documentation_documents()])
        corpus = _corpus(documents, "embedded", versions=versions)
        _warn_when_unpinned(corpus.manifest)
        rows = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
        store.write_text(folder / "documents.jsonl", "".join(rows))
        store.write_json(folder / "manifest.json", corpus.manifest)
    return corpus


def _read_corpus(folder: Path, versions: Mapping[str, str]) -> Corpus | None:
    """None if there is none, or its text does not match its manifest."""
    try:
        manifest = store.read_json(folder / "manifest.json")
        lines = (folder / "documents.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
        rows = map(json.loads, lines)
        corpus = _corpus(
            [Document(row["id"], row["source"], row["text"]) for row in rows], "embedded", versions=versions
        )
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return corpus if corpus.manifest == manifest else None


def _version(package: str) -> str:
    """Without a local part such as `+cpu`; empty when not installed."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def pinned_manifest() -> dict[str, Any]:
    """`data/corpus/manifest.json`; empty where the package is installed without it."""
    path = store.CHECKOUT / "data" / "corpus" / "manifest.json"
    return dict(store.read_json(path)) if path.is_file() else {}


def _warn_when_unpinned(manifest: Mapping[str, Any]) -> None:
    pinned = {"versions": {}, "sources": {}} | pinned_manifest()
    differing = [name for name, version in manifest["versions"].items() if pinned["versions"].get(name) != version]
    for source, description in manifest["sources"].items():
        if description["sha256"] != pinned["sources"].get(source, description)["sha256"]:
            warnings.warn(
                f"The {source} part of the embedded text is not the pinned one (versions that differ: "
                f"{', '.join(differing) or 'none'}); numbers will differ a little from the expected ones. "
                "Install with constraints.txt to get the pinned text.",
                stacklevel=3,
            )


# --- text of the user's choice ---------------------------------------------------------------------------------------


def text_documents(paths: Sequence[str | Path], size: int = PIECE_CHARACTERS) -> list[Document]:
    """Documents of UTF-8 files: text cut at blank lines near `size` characters, or one per line of `.jsonl`.

    A folder stands for all .txt, .md and .jsonl files below it, sorted by path.

    Raises:
        UserError: a file is missing, empty or not text.
    """
    files = dict.fromkeys(file for path in paths for file in _text_files(Path(path)))
    if not files:
        raise UserError("No text was given; name at least one file or folder.")
    names = Counter(file.name for file in files)
    documents = []
    for file in files:
        name = file.name if names[file.name] == 1 else file.as_posix()
        text = _read_text(file)
        texts = _jsonl_texts(file, text) if file.suffix == ".jsonl" else _cut_text(text, size)
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


def _jsonl_texts(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(text)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'Line {number} of {path} is not a JSON object with a string in "text"; write one such object per line.'
            ) from error
        if text.strip():
            texts.append(text)
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
    dataset_id: str, *, max_tokens: int | None = None, text_field: str = "text", split: str = "train", **options: Any
) -> Corpus:
    """A corpus of a Hugging Face dataset, streamed, or of a local folder of .parquet or .jsonl files.

    Rows are read up to 20 million characters, or 6 per token of `max_tokens` if that is less. Failed reads are retried
    with exponential waits and resume at the same row. Code in a dataset is never run. `options` are those of
    `datasets.load_dataset`, such as `name` and `revision`.

    Raises:
        UserError: `datasets` is not installed, the dataset or field does not exist, or the network fails.
    """
    limit = min(DATASET_CHARACTERS, 6 * (max_tokens or DATASET_CHARACTERS))
    documents: list[Document] = []
    characters = 0
    options = {"split": split, **options}
    with tqdm(desc=f"Reading {dataset_id}", unit=" characters", unit_scale=True) as progress:
        for number, row in enumerate(resumable(_dataset_opener(dataset_id, options), dataset_id)):
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
    about = {"id": dataset_id, "text_field": text_field, **options}
    return _corpus(drop_near_duplicates(documents), dataset_id, dataset=about)


def _dataset_opener(dataset_id: str, options: Mapping[str, Any]) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "Hugging Face datasets need the package `datasets`; install it with `pip install datasets`."
        ) from error
    source: dict[str, Any] = {"path": dataset_id, **options}
    if (folder := Path(dataset_id)).is_dir():
        kinds = {"parquet": sorted(folder.rglob("*.parquet")), "json": sorted(folder.rglob("*.jsonl"))}
        kind = next((kind for kind, files in kinds.items() if files), None)
        if kind is None:
            raise UserError(f"The folder {folder} holds no .parquet or .jsonl file; choose another folder.")
        source = {"path": kind, "data_files": [str(file) for file in kinds[kind]], "split": "train"}
    return lambda position: iter(datasets.load_dataset(streaming=True, **source).skip(position))


def resumable(open_at: Callable[[int], Iterator[Any]], name: str) -> Iterator[Any]:
    """Iterate over `open_at(0)`; when a read fails, wait (1, 2, 4, ... s) and resume with `open_at(rows read so far)`.

    Raises:
        UserError: `READS` attempts in a row failed, or waiting cannot help.
    """
    position, failures = 0, 0
    rows: Iterator[Any] | None = None
    while True:
        try:
            rows = open_at(position) if rows is None else rows
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            rows, failures = None, failures + 1
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not _is_transient(error):
                raise UserError(
                    f"Cannot read {name} ({reason}); check its name, split, config and revision."
                ) from error
            if failures >= READS:
                raise UserError(
                    f"Reading {name} failed {READS} times at row {position} ({reason}); "
                    "check the network and run again."
                ) from error
            wait = 2.0 ** (failures - 1)
            tqdm.write(f"Reading {name} failed ({reason}); trying again in {wait:.0f} s.", file=sys.stderr)
            time.sleep(wait)
        else:
            position, failures = position + 1, 0
            yield row


def _is_transient(error: Exception) -> bool:
    """The network's failures may go away; a wrong name, missing rights or a broken file will not."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    refused = 400 <= status < 500 and status not in (408, 429)
    hopeless = FileNotFoundError | PermissionError | IsADirectoryError | ValueError | TypeError | KeyError
    return not (refused or isinstance(error, hopeless) or "Offline" in type(error).__name__)
