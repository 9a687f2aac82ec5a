"""Every consumer knows every family: one entry is enough."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hand_model import HandModel

from lorsa_utils.heads import discovery, survey
from lorsa_utils.heads.families import FAMILIES
from lorsa_utils.heads.prompts import Passage
from lorsa_utils.heads.units import LorsaHeads
from lorsa_utils.text import Sequences
from lorsa_utils.view import evidence, explorer, pages


@pytest.fixture(scope="module")
def sequences(hand_made: HandModel, texts: list[Passage]) -> Sequences:
    return hand_made.sequences(texts[:4])


@pytest.fixture(scope="module")
def seen(hand_made: Any, known: LorsaHeads, sequences: Sequences) -> survey.Survey:
    return survey.survey(hand_made, 0, known, sequences, progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_names_tables_and_pages(
    name: str, hand_made: Any, known: LorsaHeads, texts: list[Passage], sequences: Sequences, seen: survey.Survey
) -> None:
    made = FAMILIES[name].make(hand_made.vocabulary, texts, scale=0.1)
    assert made.predicts or not FAMILIES[name].logit_sign, "a sign needs a predicted token"
    found = discovery.discover(hand_made, 0, known, {name: made}, progress=False)
    assert found.counts().keys() == {name}
    named = dataclasses.replace(found, names=pd.DataFrame({"unit": [5], "family": [name], "named": [True]}))
    row = survey.table(named, seen, known, hand_made, sequences).iloc[5]
    assert row["family"] == name
    assert f"{name}_share" in row
    told = evidence.named(row)
    labels = told["families"]
    head: Any = SimpleNamespace(head=5, n_heads=24, layer=0, model="m", group=5, n_tokens=9, dead=False)
    head.families, head.facts = labels, {"frequency": 0.1}
    assert FAMILIES[name].meaning in pages.describe(head)
    assert list(told["scores"]) == labels == [explorer._label(name)]


def test_each_family_has_its_own_draws_and_words() -> None:
    for field in ("stream", "label", "meaning", "pairs"):
        assert len({getattr(family, field) for family in FAMILIES.values()}) == len(FAMILIES)
