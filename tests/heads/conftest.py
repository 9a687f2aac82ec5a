"""The layer built by hand, and what head discovery finds in it: read once for all tests of heads."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hand_model import HandModel, known_lorsa
from test_prompts import word_tokenizer

from lorsa_utils.heads import discovery, families, prompts, units
from lorsa_utils.heads.discovery import Discovery
from lorsa_utils.heads.families import Prompts
from lorsa_utils.heads.prompts import Vocabulary


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
def found(hand_made: Any, texts: list[prompts.Passage], made: Prompts) -> Discovery:
    from test_discovery import random_heads

    lorsa = known_lorsa(hand_made)
    null = random_heads(hand_made, lorsa, texts)
    heads = units.LorsaHeads(lorsa)
    return discovery.discover(hand_made, 0, heads, made.sets, null, skipped=made.skipped, progress=False)
