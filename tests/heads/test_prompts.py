"""Labels are checked against the text they stand on, with tokenizers that have words, digits, or nothing but bytes."""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
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
    sentences = " ".join(prompts.TEMPLATES).translate(str.maketrans("{},", "   "))
    pool = [*prompts.NAMES, *series, *WORDS, *sentences.split()]
    lines = [" " + " ".join(rng.choices(pool, k=60)) + ", " for _ in range(300)]
    if numbers:
        lines += [" ".join(str(number) for number in range(100)) + " " for _ in range(20)]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=not numbers)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<bos>", "<eos>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1500, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


BYTES = Vocabulary(byte_tokenizer(), 256)


def documents(n: int = 6, length: int = 400) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [(f"d{i}", " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(length // 7))) for i in range(n)]


def word_passages(words: Vocabulary, n_words: int, length: int, seed: int) -> list[prompts.Passage]:
    rng, pool = random.Random(seed), [words.texts[token] for token in words.words]
    return prompts.passages([(f"d{i}", "".join(rng.sample(pool, n_words))) for i in range(12)], words, 24, length)


def queries(found: PromptSet, positive: bool = True) -> Iterator[tuple[Tensor, int, list[int]]]:
    """Tokens, position and sources of every labelled query, or every control."""
    for query in (found.positive == positive).nonzero()[:, 0].tolist():
        sources = found.sources[query].nonzero()[:, 0].tolist()
        yield found.tokens[found.row[query]], int(found.position[query]), sources


def check(found: PromptSet) -> None:
    """What holds for every family."""
    assert found.tokens.dtype == torch.int64
    assert len(found.row) == len(found.position) == len(found.kind) == len(found.pair) == len(found.sources)
    assert torch.equal(found.row, found.row.sort().values)
    for _, position, sources in queries(found):
        assert max(sources) <= position
    for row in found.row.unique():
        assert len(found.pair[found.row == row].unique()) == 1, "a prompt belongs to one pair"
    if found.has_controls:
        for pair in found.pair.unique():
            assert len(found.positive[found.pair == pair].unique()) == 2


# ---- random tokens


@given(n_pairs=st.integers(1, 4), length=st.integers(2, 20), seed=st.integers(0, 99))
def test_induction(n_pairs: int, length: int, seed: int) -> None:
    found = families.induction(BYTES, n_pairs, seed, length=length)
    check(found)
    assert found.predicts
    assert int(found.pair.max()) == n_pairs - 1
    for predicted, (tokens, position, (source,)) in zip(found.predicted[found.positive], queries(found), strict=True):
        assert predicted == tokens[position + 1]
        assert tokens[source - 1] == tokens[position], "after this token earlier"
        assert tokens[source] == tokens[position + 1]
        assert (tokens[:position] == tokens[position]).sum() == 1
    for tokens, position, _ in queries(found, positive=False):
        assert tokens[position] not in tokens[:position], "nothing is repeated at a control"
    assert torch.equal(found.tokens, families.induction(BYTES, n_pairs, seed, length=length).tokens)
    assert not torch.equal(found.tokens, families.induction(BYTES, n_pairs, seed + 1, length=length).tokens)


def test_controls_stand_on_the_same_tokens() -> None:
    found = families.induction(BYTES, 1, 0, length=8)
    at = found.tokens[found.row, found.position]
    others = ~found.positive & (found.row == 0), found.row == 1
    assert [at[side].tolist() for side in others] == 2 * [at[found.positive].tolist()]


def test_duplicate_tokens() -> None:
    found = families.duplicate_token(BYTES, 3)
    check(found)
    for tokens, position, (source,) in queries(found):
        assert tokens[source] == tokens[position]
        assert source < position


def test_bos_is_in_front_or_nowhere() -> None:
    last, zero, without = (families.induction(Vocabulary(byte_tokenizer(), bos), 2).tokens for bos in (256, 0, None))
    assert (zero[:, 0] == 0).all(), "token id 0 is a token like any other"
    assert without.shape[1] == last.shape[1] - 1
    assert (without < 256).all()


# ---- positions


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("previous_token", lambda i: [i - 1]),
        ("attention_sink", lambda i: [0]),
        ("local", lambda i: list(range(i - families.LOCAL_WINDOW, i + 1))),
    ],
)
def test_positional_families(name: str, wanted: Callable[[int], list[int]]) -> None:
    found = families.FAMILIES[name](BYTES, 10, 0, prompts.passages(documents(), BYTES, 10, 64))
    check(found)
    assert not found.has_controls
    assert not found.predicts
    for _, position, sources in queries(found):
        assert sources == wanted(position)


def test_passages() -> None:
    texts = prompts.passages([*documents(3), ("short", "too short")], BYTES, 9, 64)
    assert [passage.document for passage in texts].count("d0") == 3, "as many documents as possible"
    assert {passage.document for passage in texts} == {"d0", "d1", "d2"}
    assert all(len(passage.ids) == 64 for passage in texts)
    assert BYTES.tokenizer.decode(texts[0].ids) in dict(documents(3))[texts[0].document]
    assert len(prompts.passages([("d", 2000 * "a")], BYTES, 100, 64)) == 8, "of one document"
    with pytest.raises(UserError, match="no document of 64 tokens"):
        prompts.passages([("short", "too short")], BYTES, 100, 64)


def test_thematic_anchors_differ_in_the_beginning_alone(words: Vocabulary) -> None:
    found = families.thematic_anchor(words, 6, passages=word_passages(words, 90, 80, seed=2))
    check(found)
    for pair in found.pair.unique():
        tokens = found.tokens[found.row[found.pair == pair].unique()]
        assert torch.equal(tokens[0, -24:], tokens[1, -24:])
        assert not torch.equal(tokens[0, 1:-24], tokens[1, 1:-24])
    for tokens, position, sources in [*queries(found), *queries(found, positive=False)]:
        assert tokens[position] not in tokens[:position]
        assert sources in ([], list(range(1, position - families.FAR)))


@pytest.mark.parametrize(("n", "length", "told"), [(1, 80, "two documents"), (3, 40, "passages of 56")])
def test_thematic_anchors_need_text(n: int, length: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        families.thematic_anchor(BYTES, 4, passages=prompts.passages(documents(n), BYTES, 9, length))


# ---- words


def test_indirect_objects(words: Vocabulary) -> None:
    found = families.name_mover(words, 40)
    check(found)
    to = words.single(" to")
    orders, controls = set(), queries(found, positive=False)
    for (tokens, position, (source,)), (other, same, _) in zip(queries(found), controls, strict=True):
        assert tokens[position] == to
        assert tokens[source] == tokens[position + 1], "the name that was said once"
        assert (tokens[: position + 1] == tokens[source]).sum() == 1
        names = [int(i) for i in range(position) if words.texts.get(int(tokens[i]), " ")[1:] in prompts.NAMES]
        assert len(names) == 3
        assert (tokens[: position + 1] == tokens[names[2]]).sum() == 2, "the other name is said twice"
        orders.add(source == names[0])
        changed = (tokens != other)[: position + 1].nonzero()[:, 0].tolist()
        assert changed == names, "other words in the places of the names"
        assert not {words.texts[int(other[i])][1:] for i in changed} & set(prompts.NAMES)
        assert position == same
    assert orders == {True, False}
    assert torch.equal(found.tokens, families.copy_suppression(words, 40).tokens)


def test_successors(words: Vocabulary) -> None:
    found = families.successor(words, 6)
    check(found)
    kinds = found.kind[found.positive.numpy()]
    assert {"days", "months", "numerals", "letters"} <= set(kinds)
    for kind, (tokens, position, (source,)) in zip(kinds, queries(found), strict=True):
        shown, comma, after = (words.texts[int(tokens[i])].strip() for i in (source, position, position + 1))
        assert prompts.SERIES[kind].index(after) == prompts.SERIES[kind].index(shown) + 1
        assert comma == ","
    assert set(found.kind[~found.positive.numpy()]) == {"unrelated words"}
    members = {member for members in prompts.SERIES.values() for member in members}
    for tokens, position, _ in queries(found, positive=False):
        assert words.texts[int(tokens[position - 1])].strip() not in members
    for row in found.tokens[found.row[torch.from_numpy(found.kind == "numerals")]]:
        assert words.tokenizer.decode(row).rstrip("0123456789")[-1] == ",", "no space where digits stand alone"


def test_split_words(words: Vocabulary) -> None:
    found = prompts.split_words(words)
    assert len(found) >= 16
    for word in found:
        whole, first, second = (words.texts[token] for token in word)
        assert whole == " " + first + second
        assert words.encode(first + second) == [word.first, word.second]


def test_subtoken_induction(words: Vocabulary) -> None:
    found = families.subtoken_induction(words, 12)
    check(found)
    assert set(found.kind) == {"subtoken", "random", "token"}
    assert found.tokens.shape[0] == 36
    assert len(found.position.unique()) == 1, "three equally long prompts a pair"
    for first, (row, place, (source,)) in zip(range(0, 36, 3), queries(found), strict=True):
        assert words.texts[int(row[source])] == " " + "".join(words.texts[int(row[i])] for i in (place, place + 1))
        for kind, tokens in zip(found.kind[first : first + 3], found.tokens[first : first + 3], strict=True):
            assert tokens[place] == row[place]
            assert (row[source] in tokens) == (kind == "subtoken")
            assert (int((tokens == row[place]).sum()) == 2) == (kind == "token")


# ---- arithmetic


def test_arithmetic_prompts(words: Vocabulary) -> None:
    found = families.arithmetic(words, 10)
    check(found)
    for tokens, position, sources in queries(found):
        text = words.tokenizer.decode(tokens[1 : position + 1])
        sign = next(sign for sign in "+-*" if sign in text)
        a, b = (int(part) for part in text.rstrip("=").split(sign))
        assert str(prompts.OPERATORS[sign](a, b)).startswith(words.texts[int(tokens[position + 1])])
        assert "".join(words.texts[int(tokens[i])] for i in sources) == f"{a}{b}"


# ---- all of them


def test_standard_makes_every_family(words: Vocabulary) -> None:
    found = families.standard(words, word_passages(words, 110, 96, seed=3), scale=0.1)
    assert not found.skipped
    assert set(found.sets) == set(families.FAMILIES)
    for made in found.sets.values():
        check(made)


def test_standard_skips_what_a_tokenizer_lacks_with_a_sentence() -> None:
    found = families.standard(BYTES, [], scale=0.1)
    assert set(found.sets) == {"induction", "duplicate_token", "successor", "arithmetic"}
    needed = "8 first names that are single tokens, this tokenizer has 0"
    assert found.skipped["name_mover"] == f"Family name_mover needs {needed}. The family is skipped."
    assert found.skipped["local"].startswith("Family local needs passages of real text; give a longer text.")
    assert set(found.skipped) == set(families.FAMILIES) - set(found.sets)
    tiny: Any = Vocabulary(byte_tokenizer(), None)
    tiny.texts = dict(list(tiny.texts.items())[:20])
    with pytest.raises(UserError, match="needs 32 different tokens"):
        families.induction(tiny, 4)


def test_some_of_the_queries() -> None:
    found = families.induction(BYTES, 6)
    even, odd = found.halves()
    assert set(even.pair.tolist()) == {0, 2, 4}
    assert len(even.row) + len(odd.row) == len(found.row)
    check(even)
    assert torch.equal(even.predicted, found.predicted[found.pair % 2 == 0])
