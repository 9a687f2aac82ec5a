"""Topic words by hand; prompts checked against the text; a planted anchor is found first, and is worth something."""

import random
from typing import Any

import pytest
import torch
from hand_model import CODE, FIRST, PLACE, SHARP, WRITTEN, HandModel, known_lorsa
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import discovery, families, units
from lorsa_utils.heads.families import FAR
from lorsa_utils.heads.prompts import Passage, Vocabulary


@pytest.fixture(scope="module")
def texts(words: Vocabulary) -> list[Passage]:
    """Each passage has two topic words of its own, a dozen times each, among common words."""
    rng = random.Random(0)
    long = [token for token in words.words if len(words.texts[token]) > 4]
    common, own = long[:20], long[20:]
    found = []
    for number in range(20):
        topic = own[2 * number : 2 * number + 2]
        found.append(Passage(f"d{number}", tuple(rng.choices([*common, *topic * 2], k=120))))
    return found


def test_topic_words(words: Vocabulary) -> None:
    (window,), (river,), (a,) = map(words.encode, (" window", " river", "a"))
    texts = [
        Passage("x", (window, window, river, a, a)),
        Passage("y", (window,)),
        *(Passage(f"z{i}", (river, river)) for i in range(8)),
    ]
    found = families.topic_words(texts, words)
    assert found[0] == {window}, "river is in most documents and once here, a is no word"
    assert found[1:] == 9 * [set()]
    assert families.topic_words(texts[2:3], words) == [{river}], "in one document alone"


@pytest.mark.parametrize("scrambled", [False, True])
def test_topic_prompts(words: Vocabulary, texts: list[Passage], scrambled: bool) -> None:
    found = families.topic_prompts(texts, words, scrambled=scrambled)
    topics = families.topic_words(texts, words)
    assert found.predicts
    assert found.has_controls
    for number, position, positive, where in zip(found.row, found.position, found.positive, found.sources, strict=True):
        row, topic, sources = found.tokens[number], topics[number], where.nonzero()[:, 0].tolist()
        after = int(row[position + 1])
        assert (after in topic) == positive
        assert sources == [j for j in range(1, position - FAR) if positive and int(row[j]) in topic]
        assert not positive or after in row[sources]
    for number, passage in enumerate(texts[: len(found.tokens)]):
        row = found.tokens[number, 1:].tolist()
        assert sorted(row) == sorted(passage.ids)
        assert (row == list(passage.ids)) != scrambled
    with pytest.raises(UserError, match="No passage has a topic word"):
        families.topic_prompts([Passage("x", tuple(range(50, 150)))], words)


class TopicModel(HandModel):
    """Marks topic words of the passages on the first dimension of the place block, as a model of topics would."""

    topic: set[int] = set()

    def stream(self, tokens: Tensor) -> Tensor:
        x = super().stream(tokens)
        x[..., PLACE] = 0
        x[..., PLACE.start] = torch.isin(tokens, torch.tensor(sorted(self.topic))).float()
        return x


def test_a_planted_anchor(words: Vocabulary, texts: list[Passage]) -> None:
    model: Any = TopicModel(words)
    model.topic = set().union(*families.topic_words(texts, words))
    lorsa = known_lorsa(model)
    anchor = 10
    with torch.no_grad():
        for weight in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
            weight[anchor] = 0
        lorsa.b_Q[anchor] = 0
        lorsa.b_Q[anchor, 0], lorsa.b_Q[anchor, CODE] = SHARP, 0.5 * SHARP
        lorsa.W_K[anchor, PLACE.start, 0] = lorsa.W_K[anchor, FIRST, CODE] = 1
        lorsa.W_V[anchor, PLACE.start] = 1
        lorsa.W_O[anchor] = 0
        lorsa.W_O[anchor, WRITTEN] = model.codes[sorted(model.topic)].sum(dim=0)
    each, made = units.LorsaHeads(lorsa), families.topic_prompts(texts, words)
    for prompt_set in (made, families.topic_prompts(texts, words, scrambled=True)):
        responses = discovery.read(model, 0, {"heads": each}, prompt_set)["heads"]
        scores = responses.scores
        assert scores["share"].idxmax() == anchor
        assert scores["share"].max() > 0.5, "near topic words take the rest"
    assert scores["share"].max() > 2 * float((responses.at_random.sum(dim=0) / responses.total.sum(dim=0))[anchor])
    sets = {"anchor": [anchor], "other": [11], "another": [12]}
    effects = units.Removals(model, 0, made).effects(each, sets).set_index("removed")
    assert effects.loc["anchor", "labelled"] > 5 * effects["labelled"].iloc[1:].abs().max()
    assert effects.loc["anchor", "controls"] < 0, "it makes other words less likely"
