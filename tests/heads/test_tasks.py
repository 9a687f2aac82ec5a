"""Pairs differ in what decides the answer and nothing else; metrics are their formulas; bad prompts are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import tasks
from lorsa_utils.heads.prompts import Vocabulary


@pytest.mark.parametrize("name", ["induction", "indirect_object", "successor", "greater_than"])
def test_pairs_differ_and_end_at_the_same_place(words: Vocabulary, name: str) -> None:
    task = tasks.make(name, words, 12, seed=3)
    assert len(task) == 12
    assert task.clean.shape == task.corrupted.shape
    inside = torch.arange(task.clean.shape[1]) <= task.position[:, None]
    assert bool(((task.clean != task.corrupted) & inside).any(dim=1).all())
    assert set(task.clean[:, 0].tolist()) == {words.bos_id}
    for right, wrong in zip(task.answers.tolist(), task.wrong.tolist(), strict=True):
        assert not {i for i in right if i >= 0} & {i for i in wrong if i >= 0}
    again = tasks.make(name, words, 12, seed=3)
    assert torch.equal(task.clean, again.clean), "seeded"
    discovery, held_out = task.split()
    assert len(discovery) == len(held_out) == 6
    assert torch.equal(discovery.clean[1], task.clean[2])


def test_induction_asks_for_what_followed(words: Vocabulary) -> None:
    task = tasks.make("induction", words, 20, seed=1)
    for side, answers in ((task.clean, task.answers), (task.corrupted, task.wrong)):
        for row, position, answer in zip(side, task.position, answers[:, 0], strict=True):
            earlier = (row[:position] == row[position]).nonzero()[0, 0]
            assert row[earlier + 1] == answer
    for sides in zip(task.clean, task.corrupted, strict=True):
        clean, other = ((row[:-1] == row[-1]).nonzero()[0, 0] for row in sides)
        assert clean != other, "the place looked up differs, too"


def test_indirect_object_is_the_other_name(words: Vocabulary) -> None:
    task = tasks.make("indirect_object", words, 20, seed=2)
    inside = torch.arange(task.clean.shape[1]) <= task.position[:, None]
    for answer, times in ((task.answers, 1), (task.wrong, 2)):
        assert (((task.clean == answer[:, :1]) & inside).sum(dim=1) == times).all()
    assert ((task.clean != task.corrupted).sum(dim=1) == 1).all(), "one name differs"


def test_greater_than_splits_the_digits(words: Vocabulary) -> None:
    task = tasks.make("greater_than", words, 8, seed=0)
    for row, end, right, wrong in zip(task.clean.tolist(), task.position, task.answers, task.wrong, strict=True):
        third = int(words.tokenizer.decode(row[: end + 1]).split("year ")[1][2])
        for answers, digits in ((right, range(third + 1, 10)), (wrong, range(third))):
            assert [words.texts[int(i)] for i in answers if i >= 0] == [str(digit) for digit in digits]


@given(seed=st.integers(0, 100), n=st.integers(1, 4))
def test_metrics_are_their_formulas(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, n, 9, generator=generator, dtype=torch.float64).unbind()
    tokens, answers, wrong = (torch.tensor([pair] * n) for pair in ([0, 0], [1, 2], [4, -1]))
    task = tasks.Task("t", tokens, tokens, tokens[:, 0] + 1, answers, wrong)
    odds, p, q = logits.exp(), reference.softmax(dim=1), logits.softmax(dim=1)
    right = odds[:, 1] + odds[:, 2]
    assert torch.allclose(tasks.metric("logit_difference", logits, task), (right / odds[:, 4]).log())
    assert torch.allclose(tasks.metric("loss", logits, task), (right / odds.sum(dim=1)).log())
    assert torch.allclose(tasks.metric("kl", logits, task, reference), -(p * (p / q).log()).sum(dim=1))
    assert torch.allclose(tasks.metric("kl", logits, task, logits), torch.zeros(n, dtype=torch.float64), atol=1e-12)
    assert tasks.accuracy(logits, task) == float((right > odds[:, 4]).double().mean())


def test_own_prompts(words: Vocabulary) -> None:
    pair = {"clean": " Mary, John,", "corrupted": " John, Mary,", "answer": " Mary", "wrong": " John"}
    task = tasks.from_texts(words, "mine", [pair])
    assert words.tokenizer.decode(task.clean[0]) == "<bos> Mary, John,"
    for changes, told in (
        ({"answer": " Mary and John"}, "' Mary and John' of pair 1 of mine is 3 tokens"),
        ({"corrupted": " John, Mary, John,"}, r"has \d+ tokens and its corrupted one \d+; .* equal length"),
        ({"wrong": " Mary"}, "both a right and a wrong answer"),
        ({"wrong": None}, "no text under 'wrong'"),
    ):
        with pytest.raises(UserError, match=told):
            tasks.from_texts(words, "mine", [pair | changes])
    with pytest.raises(UserError, match="has no prompt"):
        tasks.from_texts(words, "mine", [])


def test_bad_input_is_refused_in_one_sentence(words: Vocabulary) -> None:
    with pytest.raises(UserError, match="no task 'juggling'; choose one of induction"):
        tasks.make("juggling", words)
    bytes_only = Vocabulary(byte_tokenizer(), 256)
    for name in ("indirect_object", "subtoken_induction", "agreement"):
        with pytest.raises(UserError, match=f"Task {name} needs"):
            tasks.make(name, bytes_only)
    with pytest.raises(UserError, match="only 60% of the prompts of juggling"):
        tasks.require_able("juggling", 0.6)
    tasks.require_able("walking", 0.9)
    task = tasks.make("induction", words, 2)
    with pytest.raises(UserError, match="not one of logit_difference"):
        tasks.metric("charm", torch.zeros(2, 9), task)
    with pytest.raises(UserError, match="needs the untouched"):
        tasks.metric("kl", torch.zeros(2, 9), task)
