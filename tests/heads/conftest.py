"""The layer built by hand, and what head discovery finds in it: read once for all tests of heads."""

import random
from typing import Any

import pytest
from hand_model import HandModel, known_lorsa
from test_prompts import word_tokenizer

from lorsa_utils.heads import discovery, families, prompts
from lorsa_utils.heads.discovery import Discovery
from lorsa_utils.heads.families import Prompts
from lorsa_utils.heads.prompts import Vocabulary
from lorsa_utils.heads.units import LorsaHeads


@pytest.fixture(scope="session")
def words() -> Vocabulary:
    tokenizer = word_tokenizer()
    return Vocabulary(tokenizer, tokenizer.bos_token_id)


@pytest.fixture(scope="session")
def hand_made(words: Vocabulary) -> HandModel:
    return HandModel(words)


@pytest.fixture(scope="session")
def texts(words: Vocabulary) -> list[prompts.Passage]:
    rng = random.Random(0)
    pool = [words.texts[token] for token in words.words]
    documents = [(f"d{i}", "".join(rng.choices(pool, k=200))) for i in range(30)]
    return prompts.passages(documents, words, 48, 64)


@pytest.fixture(scope="session")
def made(words: Vocabulary, texts: list[prompts.Passage]) -> Prompts:
    return families.standard(words, texts, scale=0.75)


@pytest.fixture(scope="session")
def known(hand_made: HandModel) -> LorsaHeads:
    return LorsaHeads(known_lorsa(hand_made))


@pytest.fixture(scope="session")
def found(hand_made: Any, known: LorsaHeads, texts: list[prompts.Passage], made: Prompts) -> Discovery:
    text = hand_made.sequences(texts)
    null = LorsaHeads(discovery.random_lorsa(known.lorsa, hand_made, 0, text.tokens.long(), text.mask))
    return discovery.discover(hand_made, 0, known, made.sets, null, skipped=made.skipped, progress=False)
