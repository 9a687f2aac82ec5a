"""Text statistics against the module's own methods, and the table of a layer built by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hand_model import KNOWN, known_lorsa

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import prompts, survey, units
from lorsa_utils.heads.discovery import Discovery
from lorsa_utils.heads.families import Prompts


def test_survey_and_table(hand_made: Any, found: Discovery, texts: list[prompts.Passage]) -> None:
    lorsa = known_lorsa(hand_made, k=6)
    with torch.no_grad():
        lorsa.W_V[23], lorsa.b_V[23] = 0, 0
    each = units.LorsaHeads(lorsa)
    sequences = hand_made.sequences(texts[:20])
    seen = survey.survey(hand_made, 0, each, sequences, batch_size=3, progress=False)
    facts = seen.facts
    assert facts.loc[1, "distance"] == pytest.approx(1, abs=1e-3)
    assert facts.loc[1, "previous_share"] == pytest.approx(1, abs=1e-3)
    assert facts.loc[2, "first_share"] == pytest.approx(1, abs=1e-3)
    assert facts.loc[23, "frequency"] == 0
    x = hand_made.stream(sequences.tokens.long())
    indices, values = lorsa.encode(x)
    kept = torch.zeros(*x.shape[:2], 24).scatter(2, indices, values)[:, 1:]
    assert np.allclose(facts["frequency"], (kept > 0).double().mean(dim=(0, 1)), atol=1e-6)
    assert np.allclose(facts["max_activation"], kept.amax(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(seen.peaks[:, 0], kept.amax(dim=(0, 1)), atol=1e-5)
    for places, values in ((seen.places, seen.peaks), (seen.sampled, seen.samples)):
        assert torch.equal(places[..., 0] == -1, values == 0)
        unit, number = (values[:23] > 0).nonzero().T
        row, position = places[unit, number].T
        assert torch.allclose(kept[row, position - 1, unit], values[unit, number], atol=1e-5)
    assert int((seen.sampled[23, :, 0] >= 0).sum()) == 0, "a dead head has no active token to draw"
    drawn = seen.sampled[0, :, 0][seen.sampled[0, :, 0] >= 0].tolist()
    assert len(set(drawn)) == len(drawn) == int((kept[:, :, 0] > 0).any(dim=1).sum()), "one of every text"
    rows = survey.table(found, seen, each, hand_made, sequences)
    assert rows["head"].tolist() == list(range(24))
    assert rows["family"].tolist()[:4] == list(KNOWN)
    assert (rows["family"][4:] == "").all()
    assert rows["dead"].tolist() == [head == 23 for head in range(24)]
    assert rows.loc[23, "contexts"] == []
    assert all("«" in text for text in rows.loc[0, "contexts"])
    days = {" " + day for day in prompts.SERIES["days"]}
    assert len(days & set(rows.loc[3, "top_logits"])) >= 4, "codes of tokens are not quite orthogonal"
    assert rows.loc[0, "induction_share"] > 0.99
    assert "induction_logit" in rows
    assert "local_precision" not in rows, "there are no controls"


def test_survey_does_not_depend_on_the_batch_size(hand_made: Any, texts: list[prompts.Passage]) -> None:
    each = units.LorsaHeads(known_lorsa(hand_made, k=6))
    sequences = hand_made.sequences(texts[:5])
    one, other = (survey.survey(hand_made, 0, each, sequences, batch_size=size, progress=False) for size in (1, 4))
    assert np.allclose(one.facts, other.facts, equal_nan=True, atol=1e-5)
    assert torch.equal(one.places, other.places)
    nothing = dataclasses.replace(sequences, mask=torch.zeros_like(sequences.mask))
    with pytest.raises(UserError, match="longer text"):
        survey.survey(hand_made, 0, each, nothing)


def test_describe_is_the_whole_way(hand_made: Any, texts: list[prompts.Passage]) -> None:
    sequences = hand_made.sequences(texts)
    documents = [(passage.document, hand_made.tokenizer.decode(passage.ids)) for passage in texts]
    lorsa = known_lorsa(hand_made)
    found = survey.describe(hand_made, 0, lorsa, sequences, documents, removed=2, scale=0.75, progress=False)
    assert found.table["family"].tolist()[:4:3] == ["induction", "successor"]
    assert found.table.loc[3, "effect"] > 0.1
    assert found.table["effect"].notna().sum() == 2, "only these predict a token"
    short = {"previous_token", "attention_sink", "local", "thematic_anchor"}
    assert set(found.discovery.skipped) == short, "no passage is 96 tokens long"
    with torch.no_grad():
        lorsa.W_V.zero_()
        lorsa.b_V.zero_()
    with pytest.raises(UserError, match="all are dead"):
        survey.describe(hand_made, 0, lorsa, sequences, documents, progress=False)


def test_thinned_keeps_pairs_from_everywhere(made: Prompts) -> None:
    few = survey._thinned(made.sets["successor"], 14)
    assert len(few.pair.unique()) == 14
    assert set(few.kind) == set(made.sets["successor"].kind)
    assert len(survey._thinned(few, 100).pair.unique()) == 14
