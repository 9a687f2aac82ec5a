"""Text: what cleaning keeps, documents on one side of the split, budgets met to the token, each piece once."""

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorsa_utils import corpus, text
from lorsa_utils.exceptions import UserError
from lorsa_utils.prose import docstring_paragraphs, module_prose, wiki_prose
from lorsa_utils.text import Document, Sequences, tokenize


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a number-word; <s> has id 0 when it is a special token."""
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4000))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


WORDS = word_tokenizer(bos_token="<s>", eos_token="</s>")
BYTES = byte_tokenizer()


def numbered(lengths: list[int], source: str = "file") -> list[Document]:
    """Documents of the given numbers of words; no word occurs twice."""
    words = iter(range(sum(lengths)))
    texts = [" ".join(f"w{i}" for i in islice(words, length)) for length in lengths]
    return [Document(f"{source}/{number}", source, text) for number, text in enumerate(texts)]


def real_tokens(sequences: Sequences) -> list[int]:
    return sequences.tokens[sequences.mask].tolist()


# ---- sequences


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    context=st.integers(3, 80),
    budget=st.one_of(st.none(), st.integers(1, 2000)),
    seed=st.integers(0, 5),
    policy=st.sampled_from(["auto", "none", "prepend"]),
)
def test_budget_is_exact_bos_stands_first_alone_and_no_token_comes_twice(
    lengths: list[int], context: int, budget: int | None, seed: int, policy: str
) -> None:
    documents = numbered([*lengths, 2])
    sequences = tokenize(documents, WORDS, context=context, n_tokens=budget, seed=seed, bos_policy=policy)
    everything = tokenize(documents, WORDS, context=context, seed=seed, bos_policy=policy)
    assert sequences.tokens.shape == sequences.mask.shape == (len(sequences.source), context)
    assert sequences.tokens.dtype == torch.int32
    assert sequences.mask.dtype == torch.bool
    assert sequences.n_tokens == (everything.n_tokens if budget is None else min(budget, everything.n_tokens))
    assert (sequences.shortfall is not None) == (budget is not None and sequences.n_tokens < budget)
    assert max(Counter(real_tokens(sequences)).values()) == 1
    assert sequences.bos_policy == ("none" if policy == "none" else "prepend")
    start = int(policy != "none")
    positions = torch.arange(context) - start
    assert torch.equal(sequences.tokens == 0, (positions < 0).expand_as(sequences.tokens))
    in_rows = sequences.mask.sum(1, keepdim=True)
    assert torch.equal(sequences.mask, (positions >= 0) & (positions < in_rows)), "real text is one run after BOS"
    assert (in_rows > 0).all()


@given(lengths=st.lists(st.integers(40, 200), min_size=1, max_size=10), context=st.integers(40, 80))
def test_every_piece_is_a_run_of_one_document_and_only_short_ends_are_left_out(
    lengths: list[int], context: int
) -> None:
    sequences = tokenize(numbered(lengths), WORDS, context=context)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row, mask in zip(sequences.tokens, sequences.mask, strict=True):
        ids = row[mask].numpy() - 3  # w0 has id 3
        assert (np.diff(ids) == 1).all()
        assert len(set(owner[ids])) == 1
    width = context - 1
    assert sequences.n_tokens == sum(
        n // width * width + (n % width if n % width >= text.MIN_LAST_PIECE else 0) for n in lengths
    )


def test_same_seed_same_order_other_seed_other_order_and_a_larger_budget_begins_alike() -> None:
    documents = numbered([300] * 10)
    first, again = (tokenize(documents, WORDS, context=33, n_tokens=900, seed=1) for _ in range(2))
    other = tokenize(documents, WORDS, context=33, n_tokens=900, seed=2)
    larger = tokenize(documents, WORDS, context=33, n_tokens=2000, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert real_tokens(larger)[:900] == real_tokens(first)
    assert real_tokens(first) != sorted(real_tokens(first))


def test_wikipedia_has_its_share_until_it_is_used_up_then_the_rest_follows() -> None:
    documents = numbered([1000], "wikipedia") + [Document(f"d/{i}", "documentation", "w3999 " * 400) for i in range(5)]
    sequences = tokenize(documents, WORDS, context=41)
    tokens_of = torch.tensor([source == "wikipedia" for source in sequences.source]) * sequences.mask.sum(1)
    head = sequences.mask.sum(1).cumsum(0) <= 1300
    assert float(tokens_of[head].sum() / sequences.mask[head].sum()) == pytest.approx(0.7, abs=0.04)
    assert int(tokens_of.sum()) == 1000
    assert sequences.source[-10:] == ["documentation"] * 10
    assert sequences.n_tokens == 3000


@pytest.mark.parametrize(("special", "policy", "first"), [
    ({"bos_token": "<s>", "eos_token": "</s>"}, "prepend", 0),
    ({"eos_token": "</s>"}, "prepend", 1),
    ({}, "none", 3),
])  # fmt: skip
def test_auto_takes_bos_then_eos_then_none_and_id_zero_is_a_bos(
    special: dict[str, str], policy: str, first: int
) -> None:
    sequences = tokenize(numbered([40]), word_tokenizer(**special), context=50)
    assert sequences.bos_policy == policy
    assert int(sequences.tokens[0, 0]) == first
    assert sequences.n_tokens == 40


def test_special_tokens_written_in_the_text_are_removed() -> None:
    sequences = tokenize([Document("a", "file", "w1 <s> w2 </s> " * 40)], WORDS, context=16)
    assert set(real_tokens(sequences)) == {4, 5}
    assert (sequences.tokens[:, 1:] != 0).all()


def test_text_shorter_than_the_context_is_padded_and_text_of_nothing_is_refused() -> None:
    sequences = tokenize([Document("a", "file", "Hello.")], BYTES, context=64, n_tokens=100)
    assert (sequences.tokens.shape, sequences.n_tokens) == ((1, 64), 6)
    assert sequences.tokens[0, 7:].unique().tolist() == [BYTES.pad_token_id]
    assert "6 tokens" in str(sequences.shortfall)
    for documents in ([], [Document("a", "file", "")], [Document("a", "file", "x")]):
        with refused("text is empty"):
            tokenize(documents, BYTES, context=64)


@pytest.mark.parametrize("bad", [{"context": 1}, {"n_tokens": 0}, {"bos_policy": "always"}])
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError):
        tokenize(numbered([50]), WORDS, **({"context": 16} | bad))  # type: ignore[arg-type]
    with refused("neither"):
        tokenize(numbered([50]), word_tokenizer(), context=16, bos_policy="prepend")


# ---- split, duplicates


def test_split_depends_on_the_name_alone_and_holds_out_a_tenth() -> None:
    documents = [Document(f"wikipedia/{i}", "wikipedia", "text") for i in range(3000)]
    train, held_out = corpus.split_documents(documents)
    assert Counter(d.id for d in [*train, *held_out]) == Counter(d.id for d in documents)
    assert 0.08 < len(held_out) / 3000 < 0.12
    assert corpus.split_documents(documents[:1499:-1])[1][::-1] == [d for d in held_out if d in documents[1500:]]


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_few_documents_still_give_both_parts(count: int, salt: int) -> None:
    assert all(corpus.split_documents([Document(f"{salt}/{i}", "file", "text") for i in range(count)]))
    assert corpus.split_documents([Document(str(salt), "file", "text")])[1] == []


def test_near_duplicates_go_and_different_texts_stay() -> None:
    words, other = ([f"word{i}" for i in row] for row in np.random.default_rng(0).integers(0, 5000, (2, 600)))
    texts = [words, [*words[:300], "changed", *words[301:]], other, [*words[:250], *other[:350]]]
    documents = [Document(str(i), "file", " ".join(text)) for i, text in enumerate(texts)]
    assert [d.id for d in corpus.drop_near_duplicates(documents)] == ["0", "2", "3"]
    assert [d.id for d in corpus.drop_near_duplicates(documents[1::-1])] == ["1"]


# ---- cleaning

GONE = "This sentence is long enough to be prose, and it has to go with all of the rest of it."
ARTICLE = """{{Infobox country|name=Utopia|motto={{lang|la|Nusquam}}}}
'''Utopia''' ({{IPA|x}}; {{lang-grc|οὐτοπία}}) is an isle of {{convert|1300|mi|km}} named by [[T.M|More]].<ref>x</ref>

[[File:Map.jpg|thumb|right|GONE]]
{| class="wikitable"
! GONE !! b
|-
| GONE || b
|}
== History ==
* [[Amaurot]]
* The oldest city of the island was founded by the king in the year of the great flood.
A ''style that is never closed runs into the next heading and it should not take it along.

== Empty section ==
{{main|Nothing}}
== References ==
GONE
=== Sources ===
GONE
== Legacy ==
The name of the island is used in many of the languages of the world &ndash; as a word for a place. [[Category:Islands]]
""".replace("GONE", GONE)


def test_wiki_markup_leaves_prose_with_headings() -> None:
    assert wiki_prose(ARTICLE).split("\n\n") == [
        "Utopia (x; οὐτοπία) is an isle of 1300 miles named by More.",
        "History",
        "The oldest city of the island was founded by the king in the year of the great flood.",
        "A style that is never closed runs into the next heading and it should not take it along.",
        "Legacy",
        "The name of the island is used in many of the languages of the world – as a word for a place.",
    ]


DOCSTRING = """Compute the median of the values along an axis, ignoring those that are not a number, as ``nanmedian``
does it.

Parameters
----------
axis : int
    The axis along which the medians are computed. The default is to compute the median of the whole array.
other : int

Notes
-----
The *sorted* values are used in Tukey [1]_, and a List[int] is made of them by [`~numpy.sort`] before the
middle one is.

.. note:: The result of this function is not the same as that of :func:`numpy.median` when the array has no value.

.. math::

    GONE

The following example shows the use of it in the code of a program that you can write::

    GONE

>>> median([1, 2, 3])  # GONE
2

.. [1] The author of the paper. GONE
   GONE
""".replace("GONE", GONE)


def test_docstrings_leave_running_english() -> None:
    assert docstring_paragraphs(DOCSTRING) == [
        "Compute the median of the values along an axis, ignoring those that are not a number, as nanmedian does it.",
        "The axis along which the medians are computed. The default is to compute the median of the whole array.",
        "The sorted values are used in Tukey, and a List[int] is made of them by numpy.sort before the middle one is.",
        "The result of this function is not the same as that of numpy.median when the array has no value.",
    ]


def test_modules_give_docstrings_in_file_order_once_without_running_them(tmp_path: Path) -> None:
    sentence = "This is sentence number {} of the module, and it is long enough to count as a line of prose in it."
    functions = "\n".join(f'def f{i}():\n    """{sentence.format(i)}"""\n    raise SystemExit\n' for i in range(8))
    path = tmp_path / "module.py"
    path.write_text(f'"""{sentence.format("zero")}"""\nraise SystemExit\n{functions}\n{functions}', encoding="utf-8")
    expected = [sentence.format(i) for i in ("zero", *range(8))]
    seen: set[str] = set()
    assert module_prose(path, seen).split("\n\n") == expected
    assert seen == set(expected)
    assert module_prose(path, seen) == ""


# ---- files

PARAGRAPH = "The committee met to discuss the plans for the new bridge over the river. Nobody objected to them.\n"


def test_files_and_folders_become_documents_split_in_two(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(f"{i}. {PARAGRAPH}" for i in range(600)), encoding="utf-8")
    (tmp_path / "notes.md").write_text(PARAGRAPH, encoding="utf-8-sig")
    (tmp_path / "rows.jsonl").write_text('{"text": "One\u2028row."}\n\n{"text": "Two rows."}\n', encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    made = corpus.text_corpus([tmp_path])
    documents = [*made.train, *made.held_out]
    assert all((made.train, made.held_out))
    assert {d.id.split("#")[0] for d in documents} == {"file/long.txt", "file/notes.md", "file/rows.jsonl"}
    assert {d.text for d in documents if "rows" in d.id} == {"One\u2028row.", "Two rows."}
    assert all(len(d.text) <= corpus.PIECE_CHARACTERS for d in documents)
    assert made.manifest["sources"]["file"]["documents"] == len(documents)
    again = corpus.text_corpus([str(tmp_path / "rows.jsonl"), *tmp_path.glob("*.[tm]*")])
    assert again.manifest["sha256"] == made.manifest["sha256"]


@settings(max_examples=40)
@given(st.lists(st.text("ab. \n", max_size=60), max_size=30).map("".join), st.integers(5, 50))
def test_cutting_loses_nothing(content: str, size: int) -> None:
    pieces = corpus._cut_text(content, size)
    assert "".join("".join(pieces).split()) == "".join(content.split())
    assert all(len(piece) <= 2 * size for piece in pieces)


def test_a_short_file_is_cut_finer_so_that_some_can_be_held_out(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("\n".join([PARAGRAPH] * 20), encoding="utf-8")
    made = corpus.text_corpus([path])
    assert all((made.train, made.held_out))
    assert len(corpus.text_documents([path])) == 1


@pytest.mark.parametrize(("name", "content", "says"), [
    ("missing.txt", None, "check the path"),
    ("empty.txt", b" \n", "is empty"),
    ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8 text"),
    ("nul.txt", b"text\0text", "binary file"),
    ("bad.jsonl", b'{"text": "a"}\n{"body": "a"}\n', "Line 2"),
    ("number.jsonl", b'{"text": 3}\n', "Line 1 .* a string in"),
    ("none.jsonl", b'{"text": ""}\n', "is empty"),
])  # fmt: skip
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with refused(says) as caught:
        corpus.load_corpus(text=[path])
    assert name in str(caught.value)


def test_load_text_gives_two_parts_of_one_text_and_one_where_it_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"{i}. {PARAGRAPH}" for i in range(600)), encoding="utf-8")
    model: Any = SimpleNamespace(tokenizer=BYTES)
    loaded = text.load_text(model, 500, [path], held_out_tokens=300, context=32, bos_policy="none", seed=3)
    assert loaded.held_out
    assert (loaded.train.n_tokens, loaded.held_out.n_tokens) == (500, 300)
    assert loaded.train.origin == [str(path)]
    documents = loaded.train.documents
    assert not {document.id for document in documents} & {document.id for document in loaded.held_out.documents}
    again = tokenize(documents, BYTES, context=32, n_tokens=500, bos_policy="none", seed=3)
    assert torch.equal(loaded.train.tokens, again.tokens)
    path.write_text("One sentence.", encoding="utf-8")
    assert text.load_text(model, 500, [path]).held_out is None


def test_a_folder_without_text_no_file_and_both_sources_are_refused(tmp_path: Path) -> None:
    for paths, sentence in (([tmp_path], "holds no .txt"), ([], "No text was given")):
        with refused(sentence):
            corpus.text_corpus(paths)
    with refused("not both"):
        corpus.load_corpus(text=[tmp_path], dataset="x/y")


# ---- datasets


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds slept."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_a_stream_that_fails_goes_on_where_it_stopped(waits: list[float]) -> None:
    opened, failures = [], [3, 3, 7]

    def open_at(position: int) -> Iterator[int]:
        opened.append(position)
        for row in range(position, 10):
            if failures[:1] == [row]:
                del failures[0]
                raise ConnectionError("reset")
            yield row

    assert list(corpus.resumable(open_at, "rows")) == list(range(10))
    assert opened == [0, 3, 3, 7]
    assert waits == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(("error", "says", "waited"), [
    (ConnectionError("no route to host"), "failed 6 times at row 0 .no route", [1.0, 2.0, 4.0, 8.0, 16.0]),
    (FileNotFoundError("no such dataset"), "check its name", []),
])  # fmt: skip
def test_a_stream_that_stays_away_and_one_that_does_not_exist_are_told(
    waits: list[float], error: Exception, says: str, waited: list[float]
) -> None:
    with refused(says):
        list(corpus.resumable(Mock(side_effect=error), "rows"))
    assert waits == waited


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_local_dataset_is_read_without_a_network(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import pandas as pd

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [" ".join(f"word{i}x{j}" for j in range(30)) for i in range(40)]
    frame = pd.DataFrame({"body": [*texts, texts[0], ""]})
    folder = tmp_path / "dataset"
    folder.mkdir()
    if kind == "parquet":
        frame.to_parquet(folder / "rows.parquet")
    else:
        frame.to_json(folder / "rows.jsonl", orient="records", lines=True)
    made = corpus.hub_corpus(str(folder), text_field="body")
    assert sorted(d.text for d in [*made.train, *made.held_out]) == sorted(texts)
    assert made.held_out
    limited = corpus.hub_corpus(str(folder), text_field="body", max_tokens=5 * len(texts[0]) // 6)
    assert limited.manifest["documents"] in (5, 6)
    with refused("choose text_field among body"):
        corpus.hub_corpus(str(folder))


# ---- the embedded corpus


def test_pins_in_the_manifest_are_those_the_code_fetches() -> None:
    manifest = corpus.pinned_manifest()
    assert manifest["fetch"] == corpus.WIKIPEDIA._asdict() | {"pip_args": list(corpus.WIKIPEDIA.pip_args)}
    assert manifest["version"] == corpus.CORPUS_VERSION
    assert manifest["split"] == corpus.SPLIT_RULE
    assert set(corpus.DOCUMENTATION_PACKAGES) < set(manifest["versions"])
    assert manifest["sources"]["wikipedia"]["characters"] > 2_500_000


@pytest.fixture
def small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded corpus made of two tiny parts, in a data folder of its own."""
    wikipedia, documentation = (
        [Document(f"{source}/{i}", source, text.format(i)) for i in range(5)]
        for source, text in (("wikipedia", "Article {} \u2028 of its own."), ("documentation", "Module {} says more."))
    )
    monkeypatch.setenv("LORSA_DATA", str(tmp_path))
    monkeypatch.setattr(corpus.WheelFile, "fetch", lambda pinned, path: path)
    monkeypatch.setattr(corpus, "wikipedia_documents", lambda path: wikipedia)
    monkeypatch.setattr(corpus, "documentation_documents", lambda: documentation)
    monkeypatch.setattr(corpus, "_version", lambda package: "0" if package == "numpy" else "1.0")
    return tmp_path


def test_embedded_text_is_built_once_and_rebuilt_when_its_cache_is_damaged(
    small_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "pinned_manifest", dict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = corpus.embedded_corpus()
    (stored,) = (small_parts / "cache" / "corpus").glob("*/documents.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "wikipedia_documents", None)
        assert corpus.embedded_corpus() == built
    content = stored.read_bytes()
    stored.write_bytes(content.replace(b"Module 3", b"Module 8"))
    assert corpus.embedded_corpus() == built
    assert stored.read_bytes() == content


def test_text_other_than_the_pinned_one_warns_and_works(small_parts: Path) -> None:
    with pytest.warns(UserWarning, match="embedded text is not the pinned one .*numpy") as caught:
        assert corpus.embedded_corpus().train
    assert [str(warning.message).split()[1] for warning in caught] == ["wikipedia", "documentation"]


@given(n=st.integers(0, 9), batch_size=st.integers(1, 5))
def test_batches_are_all_sequences_in_order(n: int, batch_size: int) -> None:
    tokens = torch.arange(n * 4, dtype=torch.int32).view(n, 4)
    sequences = Sequences(tokens, tokens % 3 > 0, ["some"] * n, "none", "")
    batches = list(sequences.batches(batch_size, torch.device("cpu")))
    assert [len(rows) for rows, _ in batches] == [min(batch_size, n - first) for first in range(0, n, batch_size)]
    for number, side in enumerate((tokens.long(), sequences.mask)):
        assert torch.equal(torch.cat([side[:0], *(batch[number] for batch in batches)]), side)
    assert all(rows.dtype == torch.long for rows, _ in batches)
