"""Labels are checked against the text they stand on, with tokenizers that have words, digits, or nothing but bytes."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families, prompts
from lorsa_utils.heads.prompts import PromptSet, Vocabulary

WORDS = prompts.listed(
    "store garden bottle window river yellow letter mountain paper silver orange table market bridge winter summer"
)


@functools.cache
def word_tokenizer(numbers: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on names, series and words; digits are single tokens, or whole numbers are."""
    rng = random.Random(0)
    series = [word for members in prompts.SERIES.values() for word in members if not word.isdigit()]
    pool = [
        *prompts.NAMES,
        *series,
        *WORDS,
        *" ".join(prompts.TEMPLATES).translate(str.maketrans("{},", "   ")).split(),
    ]
    lines = [" " + " ".join(rng.choices(pool, k=60)) + ", " for _ in range(300)]
    if numbers:
        lines += [" ".join(str(number) for number in range(100)) + " " for _ in range(20)]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=not numbers)
    # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def numbers() -> Vocabulary:
    return Vocabulary(word_tokenizer(numbers=True), None)


@pytest.fixture(scope="module")
def bytes_only() -> Vocabulary:
    return Vocabulary(byte_tokenizer(), 256)


def documents(n: int = 6, length: int = 400) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [(f"d{i}", " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(length // 7))) for i in range(n)]


def labelled(found: PromptSet) -> list[int]:
    return [int(index) for index in found.positive.nonzero()[:, 0]]


def sources_of(found: PromptSet, query: int) -> list[int]:
    return [int(position) for position in found.sources[query].nonzero()[:, 0]]


def check(found: PromptSet) -> None:
    """What holds for every family."""
    assert found.tokens.dtype == torch.int64
    assert len(found.row) == len(found.position) == len(found.positive) == len(found.pair) == len(found.sources)
    assert len(found.kind) == len(found.tokens)
    for query in range(len(found.row)):
        there = sources_of(found, query)
        assert bool(found.positive[query]) == bool(there)
        assert all(0 <= source <= int(found.position[query]) for source in there)
    for pair in found.pair.unique():
        rows = found.row[found.pair == pair].tolist()
        assert {int(other) for row in rows for other in found.pair[found.row == row]} == {int(pair)}, (
            "a prompt belongs to one pair"
        )
        if found.has_controls:
            assert len(set(found.positive[found.pair == pair].tolist())) == 2


# ---- random tokens


@given(n_pairs=st.integers(1, 4), length=st.integers(2, 20), seed=st.integers(0, 99))
def test_induction(bytes_only: Vocabulary, n_pairs: int, length: int, seed: int) -> None:
    found = families.induction(bytes_only, n_pairs, seed, length)
    check(found)
    assert found.predicts
    assert int(found.pair.max()) == n_pairs - 1
    for query in labelled(found):
        tokens, position = found.tokens[found.row[query]], int(found.position[query])
        (source,) = sources_of(found, query)
        assert tokens[source - 1] == tokens[position], "after the earlier occurrence of this token"
        assert tokens[source] == tokens[position + 1] == found.predicted[query]
        assert (tokens[:position] == tokens[position]).sum() == 1
    for query in (~found.positive).nonzero()[:, 0].tolist():
        position = int(found.position[query])
        assert found.tokens[found.row[query]][position] not in found.tokens[found.row[query]][:position], (
            "nothing is repeated at a control"
        )


def test_controls_stand_on_the_same_tokens(bytes_only: Vocabulary) -> None:
    found = families.induction(bytes_only, 1, 0, 8)
    at = {name: [] for name in ("labelled", "first half", "other")}  # type: ignore[var-annotated]
    for query in range(len(found.row)):
        name = "labelled" if found.positive[query] else ("first half" if found.row[query] == 0 else "other")
        at[name].append(int(found.tokens[found.row[query], found.position[query]]))
    assert at["labelled"] == at["first half"] == at["other"]


def test_duplicate_tokens(bytes_only: Vocabulary) -> None:
    found = families.duplicate_token(bytes_only, 3)
    check(found)
    for query in labelled(found):
        (source,) = sources_of(found, query)
        assert found.tokens[found.row[query], source] == found.tokens[found.row[query], found.position[query]]
        assert source < found.position[query]


def test_seeds(bytes_only: Vocabulary) -> None:
    first, same, other = (families.induction(bytes_only, 2, seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_bos_is_in_front_or_nowhere() -> None:
    tokenizer = byte_tokenizer()
    assert (families.induction(Vocabulary(tokenizer, 0), 2).tokens[:, 0] == 0).all(), (
        "token id 0 is a token like any other"
    )
    without = families.induction(Vocabulary(tokenizer, None), 2)
    assert without.tokens.shape[1] == families.induction(Vocabulary(tokenizer, 256), 2).tokens.shape[1] - 1
    assert (without.tokens < 256).all()


# ---- positions


def test_positional_families(bytes_only: Vocabulary) -> None:
    texts = prompts.passages(documents(), bytes_only, 10, 64)
    for make, wanted in (
        (families.previous_token, lambda i: [i - 1]),
        (families.attention_sink, lambda i: [0]),
        (families.local, lambda i: list(range(i - families.LOCAL_WINDOW, i + 1))),
    ):
        found = make(bytes_only, texts, 10)
        check(found)
        assert not found.has_controls
        assert not found.predicts
        for query in labelled(found):
            assert sources_of(found, query) == wanted(int(found.position[query]))  # type: ignore[no-untyped-call]


def test_passages(bytes_only: Vocabulary) -> None:
    texts = prompts.passages([*documents(3), ("short", "too short")], bytes_only, 100, 64, per_document=2)
    assert {passage.document for passage in texts} == {"d0", "d1", "d2"}
    assert len(texts) == 6
    assert all(len(passage.ids) == 64 for passage in texts)
    assert bytes_only.tokenizer.decode(texts[0].ids) in dict(documents(3))[texts[0].document]
    with pytest.raises(UserError, match="no document of 64 tokens"):
        prompts.passages([("short", "too short")], bytes_only, 100, 64)


def test_thematic_anchors_differ_in_the_beginning_alone(words: Vocabulary) -> None:
    rng = random.Random(2)
    own = [(f"d{i}", " " + " ".join(rng.sample([words.texts[t][1:] for t in words.words], 90))) for i in range(8)]
    found = families.thematic_anchor(words, prompts.passages(own, words, 16, 80), 6)
    check(found)
    for pair in found.pair.unique():
        rows = found.row[found.pair == pair].unique()
        tokens = found.tokens[rows]
        assert torch.equal(tokens[0, -24:], tokens[1, -24:])
        assert not torch.equal(tokens[0, 1:-24], tokens[1, 1:-24])
    for query in range(len(found.row)):
        tokens, position = found.tokens[found.row[query]], int(found.position[query])
        assert tokens[position] not in tokens[:position]
        if found.positive[query]:
            assert sources_of(found, query) == list(range(1, position - families.FAR))


@pytest.mark.parametrize(("n", "length", "told"), [(1, 80, "two documents"), (3, 40, "passages of 56")])
def test_thematic_anchors_need_text(bytes_only: Vocabulary, n: int, length: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        families.thematic_anchor(bytes_only, prompts.passages(documents(n), bytes_only, 9, length), 4)


# ---- words


def test_indirect_objects(words: Vocabulary) -> None:
    found = families.name_mover(words, 40)
    check(found)
    to = words.single(" to")
    orders = set()
    for query in labelled(found):
        tokens, position = found.tokens[found.row[query]], int(found.position[query])
        (source,) = sources_of(found, query)
        assert tokens[position] == to
        assert tokens[source] == tokens[position + 1] == found.predicted[query], "the name that was said once"
        assert (tokens[: position + 1] == tokens[source]).sum() == 1
        names = [int(i) for i in range(position) if words.texts.get(int(tokens[i]), " ")[1:] in prompts.NAMES]
        assert len(names) == 3
        assert (tokens[: position + 1] == tokens[names[2]]).sum() == 2, "the other name is said twice"
        orders.add(source == names[0])
    assert orders == {True, False}
    for control in (~found.positive).nonzero()[:, 0].tolist():
        (labelled_query,) = (query for query in labelled(found) if found.pair[query] == found.pair[control])
        own, other = (found.tokens[found.row[query]] for query in (labelled_query, control))
        changed = [int(i) for i in (own != other).nonzero()[:, 0] if i <= found.position[control]]
        assert len(changed) == 3, "the same sentence with other words in the places of the names"
        assert not {words.texts[int(other[i])][1:] for i in changed} & set(prompts.NAMES)
        assert found.position[control] == found.position[labelled_query]
    assert torch.equal(found.tokens, families.copy_suppression(words, 40).tokens)


def test_successors(words: Vocabulary) -> None:
    found = families.successor(words, 6)
    check(found)
    seen = set()
    for query in labelled(found):
        kind = found.kinds()[query]
        (source,) = sources_of(found, query)
        row = found.tokens[found.row[query]]
        shown, after = (words.texts[int(token)].strip() for token in (row[source], found.predicted[query]))
        members = prompts.SERIES[kind]
        assert members.index(after) == members.index(shown) + 1
        assert words.texts[int(row[found.position[query]])] == ","
        seen.add(kind)
    assert {"days", "months", "numerals", "letters"} <= seen
    unrelated = {found.kinds()[query] for query in (~found.positive).nonzero()[:, 0].tolist()}
    assert unrelated == {"unrelated words"}
    listed = found.tokens[found.row, found.position - 1][~found.positive]
    controls = {words.texts[token].strip() for token in listed.tolist()}
    assert not controls & {member for members in prompts.SERIES.values() for member in members}


def test_numerals_go_without_spaces_where_digits_stand_alone(words: Vocabulary) -> None:
    found = families.successor(words, 3)
    numerals = found.tokens[found.row[torch.tensor([kind == "numerals" for kind in found.kinds()])]]
    assert all(words.tokenizer.decode(row).rstrip("0123456789")[-1] == "," for row in numerals)


def test_split_words(words: Vocabulary) -> None:
    found = prompts.split_words(words, "")
    assert len(found) >= 16
    for word in found:
        whole, first, second = (words.texts[token] for token in word)
        assert whole == " " + first + second
        assert words.encode(first + second) == [word.first, word.second]


def test_subtoken_induction(words: Vocabulary) -> None:
    found = families.subtoken_induction(words, 12)
    check(found)
    assert set(found.kind) == {"subtoken", "random", "token"}
    for pair in found.pair.unique():
        queries = (found.pair == pair).nonzero()[:, 0].tolist()
        position = {int(found.position[query]) for query in queries}
        assert len(position) == 1, "all three prompts of a pair are equally long"
        assert len({int(found.tokens[found.row[query], found.position[query]]) for query in queries}) == 1
        (query,) = [query for query in queries if found.positive[query]]
        (source,) = sources_of(found, query)
        row, place = found.tokens[found.row[query]], int(found.position[query])
        assert words.texts[int(row[source])] == " " + "".join(words.texts[int(row[i])] for i in (place, place + 1))
        for other in queries:
            kind, tokens = found.kinds()[other], found.tokens[found.row[other]]
            assert (row[source] in tokens) == (kind == "subtoken")
            assert (int((tokens == row[place]).sum()) == 2) == (kind == "token")


# ---- arithmetic


def test_arithmetic_prompts(words: Vocabulary) -> None:
    found = families.arithmetic(words, 10)
    check(found)
    for query in labelled(found):
        text = words.tokenizer.decode(found.tokens[found.row[query], 1 : found.position[query] + 1])
        sign = next(sign for sign in "+-*" if sign in text)
        a, b = (int(part) for part in text.rstrip("=").split(sign))
        assert str(prompts.OPERATORS[sign](a, b)).startswith(words.texts[int(found.predicted[query])])
        shown = [words.texts[int(found.tokens[found.row[query], i])] for i in sources_of(found, query)]
        assert "".join(shown) == f"{a}{b}"


# ---- all of them


def test_standard_makes_every_family(words: Vocabulary) -> None:
    rng = random.Random(3)
    own = [(f"d{i}", " " + " ".join(rng.sample([words.texts[t][1:] for t in words.words], 110))) for i in range(12)]
    found = families.standard(words, prompts.passages(own, words, 24, 96), scale=0.1)
    assert not found.skipped
    assert set(found.sets) == set(families.FAMILIES)
    for family, each in found.sets.items():
        assert each.family == family
        check(each)


def test_standard_skips_what_a_tokenizer_lacks_with_a_sentence(bytes_only: Vocabulary) -> None:
    found = families.standard(bytes_only, [], scale=0.1)
    assert set(found.skipped) >= {
        "name_mover",
        "copy_suppression",
        "subtoken_induction",
        "previous_token",
        "thematic_anchor",
    }
    assert {"induction", "duplicate_token", "arithmetic"} <= set(found.sets)
    for sentence in found.skipped.values():
        assert sentence.endswith(".")
        assert "skipped" in sentence or "give a longer text" in sentence
    tiny: Any = Vocabulary(byte_tokenizer(), None)
    tiny.texts = dict(list(tiny.texts.items())[:20])
    with pytest.raises(UserError, match="needs 32 different tokens"):
        families.induction(tiny, 4)


def test_keep_pairs(bytes_only: Vocabulary) -> None:
    found = families.induction(bytes_only, 6)
    even, odd = (found.keep_pairs(lambda pair, rest=rest: pair % 2 == rest) for rest in (0, 1))
    assert set(even.pair.tolist()) == {0, 2, 4}
    assert len(even.row) + len(odd.row) == len(found.row)
    check(even)
    assert torch.equal(even.predicted, found.predicted[found.pair % 2 == 0])
