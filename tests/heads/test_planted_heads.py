"""Real Lorsa heads built by hand, from activations to explanations: digits, a comma as source, a word seen before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hand_model import BEFORE, CODE, D_MODEL, DAY, FIRST, PLACE, PLACE_BEFORE, SHARP, TOKEN, HandModel
from test_prompts import word_tokenizer
from toys import sequences_of

from lorsa_utils.activations import ActivationStream
from lorsa_utils.autointerp import examples, study
from lorsa_utils.autointerp.examples import Budget, Dictionary
from lorsa_utils.autointerp.judges import RulesJudge
from lorsa_utils.config import LorsaConfig
from lorsa_utils.heads.prompts import Vocabulary
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.text import Sequences

LENGTH = 32


def text(model: HandModel, digits: Sequence[int], comma: int) -> Sequences:
    """Few commas, digits and repetitions."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(260):
        row = rng.choice(np.array(model.vocabulary.words), LENGTH - 1, replace=False)
        places = rng.permutation(np.arange(3, LENGTH - 2))
        if rng.random() < 0.5:
            row[places[0]] = comma
        if rng.random() < 0.5:
            row[places[1]] = rng.choice(digits)
        if rng.random() < 0.5:
            row[max(places[2:4])] = row[min(places[2:4])]
        rows.append([model.vocabulary.bos_id, *row.tolist()])
    tokens = torch.tensor(rows)
    return sequences_of(tokens, tokens != model.vocabulary.bos_id)


def planted(model: HandModel, comma: int) -> Lorsa:
    """Head 0 reads a digit on its token, head 1 a comma before, head 2 rests on the first token until one returns."""
    lorsa = Lorsa(LorsaConfig(d_model=D_MODEL, n_ov_heads=3, n_qk_heads=3, d_qk=CODE + 1, k=3, attn_scale=1.0))
    circuits = ((PLACE, PLACE), (PLACE_BEFORE, PLACE), (TOKEN, BEFORE))
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        for head, (query, key) in enumerate(circuits):
            lorsa.W_Q[head, query, :CODE], lorsa.W_K[head, key, :CODE] = SHARP * torch.eye(CODE), torch.eye(CODE)
            lorsa.W_K[head, FIRST, CODE] = 1
            lorsa.b_Q[head, CODE] = 0.7 * SHARP
        lorsa.W_V[0, DAY], lorsa.b_V[0] = 1.0, -0.5
        lorsa.W_V[1, TOKEN], lorsa.b_V[1] = model.codes[comma], -0.6
        lorsa.W_V[2, FIRST], lorsa.b_V[2] = -2.0, 1.0
        lorsa.W_O.copy_(torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0)))
    return lorsa.requires_grad_(False)


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    tokenizer = word_tokenizer()
    model = HandModel(Vocabulary(tokenizer, tokenizer.bos_token_id))
    digits = [model.vocabulary.encode(str(digit))[0] for digit in range(10)]
    comma = model.vocabulary.single(",")
    assert comma is not None
    model.days = torch.tensor(digits)  # what the stream marks
    budget = Budget(units=3, shown=40, contrast=40, scored=20, oversampling=1)
    dictionary = Dictionary("Lorsa", 0, planted(model, comma))
    any_model: Any = model
    source = ActivationStream(any_model, text(model, digits, comma), [0])
    firings = examples.record_firings(source, [dictionary], {0: model.site(0)}, tokenizer, budget, 64, progress=False)
    sets = [examples.examples(one, budget) for one in firings]
    return study.study(sets, RulesJudge(), progress=False).set_index("unit")


def test_planted_heads_are_explained(scores: pd.DataFrame) -> None:
    assert scores["explanation"].to_dict() == {
        0: "Active on a digit.",
        1: 'Active on a token right after ",".',
        2: "Active on a token that occurred earlier.",
    }


def test_planted_heads_score_above_nine_tenths(scores: pd.DataFrame) -> None:
    assert (scores[["detection", "fuzzing", "simulation"]] > 0.9).all().all()
    assert (scores["shuffled"] < 0.7).all()
