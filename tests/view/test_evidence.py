"""What a page shows, against the module's own methods in plain form."""

import dataclasses
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_heads import DEAD, LAYER, LENGTH, Tiny
from tiny_models import byte_tokenizer

from lorsa_utils.config import SAEConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families
from lorsa_utils.lorsa import SAE
from lorsa_utils.models import LanguageModel
from lorsa_utils.view import evidence, pages
from lorsa_utils.view.evidence import Evidence, Head


def collected(tiny: Tiny, *chosen: int, **options: object) -> list[Head]:
    return list(tiny.evidence(**options).heads(chosen))


def test_contexts_are_exact(tiny: Tiny) -> None:
    (head,) = collected(tiny, 5, batch_size=3)
    assert {context.place.kind for context in head.contexts} == {"top", "sample", "random"}
    norm, group, cut = tiny.lorsa.W_O[5].norm(), 5 // 4, 0
    for context in head.contexts:
        row, position = context.place.row, context.place.position
        x, _ = tiny.model.capture(tiny.sequences.tokens[row : row + 1].long(), [LAYER])[LAYER]
        z, attention = tiny.lorsa.z_pattern(x, 5)[0] * norm, tiny.lorsa.attention_pattern(x, group)[0]
        n, start = len(context.activation), context.positions[context.n_before]
        last = min(149 if row == 0 else LENGTH - 1, position + evidence.AFTER)  # padding is not shown
        assert context.positions[context.n_before :] == list(range(start, last + 1))
        assert start == max(0, position - evidence.BEFORE) == position - context.peak
        apart = [column for column, place in enumerate(context.positions) if place >= 0]
        places = [context.positions[column] for column in apart]
        for part, full in ((context.z_pattern, z), (context.attention, attention)):
            window = full[start : start + n]
            assert torch.allclose(part[:, apart], window[:, places], atol=1e-5)
            assert torch.allclose(part.sum(dim=1), window.sum(dim=1), atol=1e-4), "one column holds the rest"
        assert torch.allclose((context.attention * context.v)[:, apart], context.z_pattern[:, apart], atol=1e-5)
        indices, values = tiny.lorsa.encode(x)
        kept = ((indices == 5) * values).sum(dim=-1)[0] * norm
        assert torch.allclose(context.activation, kept[start : start + n], atol=1e-5)
        cut += -1 in context.positions
        assert context.positions[1:2] == [-1] or -1 not in context.positions
    assert cut, "some window begins late enough for sources to be added up"


def test_places_are_what_they_say(tiny: Tiny) -> None:
    (head, other) = collected(tiny, 2, 3)
    tops, samples = (
        [float(context.activation[context.peak]) for context in head.contexts if context.place.kind == kind]
        for kind in ("top", "sample")
    )
    ranks = [context.place.rank for context in head.contexts if context.place.kind == "sample"]
    for falling in (tops, samples, ranks):
        assert falling == sorted(falling, reverse=True)
    assert tops[0] == pytest.approx(head.facts["max_activation"], rel=1e-4)
    assert samples[-1] > 0
    assert 0 < ranks[-1] < ranks[0] < 1
    drawn, same = ([c.place for c in each.contexts if c.place.kind == "random"] for each in (head, other))
    assert drawn == same, "random places are the same for all heads"


def test_many_heads_are_those_taken_alone(tiny: Tiny) -> None:
    heads = collected(tiny, 0, 7, DEAD)
    assert [head.dead for head in heads] == [False, False, True]
    assert {context.place.kind for context in heads[2].contexts} == {"random"}
    assert not any(bool(context.activation.any()) for context in heads[2].contexts)
    for head in heads:
        (alone,) = collected(tiny, head.head, batch_size=2)
        assert alone.raised == head.raised
        for context, other in zip(alone.contexts, head.contexts, strict=True):
            assert context.tokens == other.tokens
            assert torch.allclose(context.z_pattern, other.z_pattern, atol=1e-5)


@pytest.mark.parametrize("gathered", [True, False])
def test_each_text_is_read_once(tiny: Tiny, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, hidden = [], LanguageModel._hidden
    monkeypatch.setattr(LanguageModel, "_hidden", lambda model, ids: passes.append(len(ids)) or hidden(model, ids))
    known, began = tiny.evidence(), time.perf_counter()
    if gathered:
        known = Evidence.gather(tiny.model, LAYER, tiny.lorsa, tiny.sequences, batch_size=4, progress=False)
    heads = list(known.heads([5, *range(8), *range(4)]))
    assert [len(pages.head_page(head)) < 2_000_000 for head in heads] == [True] * 13
    assert sum(passes) <= len(tiny.sequences.tokens)
    assert (time.perf_counter() - began) / len(heads) < 2, "seconds per page"
    if gathered:
        (other,) = collected(tiny, 5)
        assert heads[0].facts == pytest.approx(other.facts)
        assert [context.place for context in heads[0].contexts] == [context.place for context in other.contexts]
        assert sum(heads[0].shares or []) == pytest.approx(1, abs=1e-4)


def test_weights_are_compared_by_cosine(tiny: Tiny) -> None:
    sae, transcoder = (SAE(SAEConfig(d_model=64, n_features=16, k=2, kind=kind)) for kind in ("sae", "transcoder"))
    with torch.no_grad():
        sae.W_O.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)))
        transcoder.W_E.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(2)))
        sae.W_O[11], transcoder.W_E[3] = 5 * tiny.lorsa.W_O[6], 2 * tiny.lorsa.W_V[6]
    (head,) = collected(tiny, 6, sae=sae, transcoder=transcoder)
    for features, nearest in ((head.written_features, 11), (head.read_features, 3)):
        assert features is not None
        assert features[0][:2] == (nearest, pytest.approx(1, abs=1e-5))
    assert head.siblings["head"].tolist() == [4, 5, 7]
    w = tiny.lorsa.W_O
    cosines = [float(w[i] @ w[6] / w[i].norm() / w[6].norm()) for i in (4, 5, 7)]
    assert head.siblings["cos_o"].tolist() == pytest.approx(cosines, abs=1e-5)
    with pytest.raises(UserError, match="give an SAE of the layer's output"):
        collected(tiny, 6, sae=transcoder)


def test_names_scores_and_explanations(tiny: Tiny) -> None:
    table = pd.DataFrame({"head": range(24), "families": "", "effect": np.nan, "effect_error": np.nan})
    columns = ["families", "induction_share", "induction_auc", "local_share", "effect", "effect_error"]
    table.loc[1, columns] = ["induction; local", 0.9, 0.8, 0.7, 0.02, 0.01]
    shares = torch.full((24, 4), 0.25)
    shares[2] = float("nan")
    one, two = collected(tiny, 1, 2, table=table, shares=shares, explanations={2: ("colours", 0.75)})
    assert one.families == [families.FAMILIES["induction"].label, families.FAMILIES["local"].label]
    assert one.scores["induction"] == {"share": 0.9, "auc": 0.8}
    assert one.effect == (0.02, 0.01)
    assert one.shares == [0.25] * 4
    assert (two.families, two.scores, two.effect, two.shares) == ([], {}, None, None)
    assert (two.explanation, two.score) == ("colours", 0.75)
    assert two.named


def test_what_does_not_belong_together_is_refused(tiny: Tiny) -> None:
    for head, sentence in ((24, "no unit 24 among 24 Lorsa heads; choose one from 0 to 23"), (-1, "no unit -1")):
        with pytest.raises(UserError, match=sentence):
            collected(tiny, head)
    with pytest.raises(UserError, match="belongs to another module"):
        collected(tiny, 1, table=pd.DataFrame({"head": range(3), "families": ""}))
    short = dataclasses.replace(tiny.sequences, tokens=tiny.sequences.tokens[:2], mask=tiny.sequences.mask[:2])
    with pytest.raises(UserError, match="of another text"):
        tiny._replace(sequences=short).evidence()


def test_what_was_read_is_remembered_but_not_inside_splice(tiny: Tiny) -> None:
    tokens = tiny.sequences.tokens[:5].long()
    plain = tiny.model.capture(tokens, [LAYER])[LAYER]
    model, small = (evidence.ReadOnce(tiny.model, LAYER, limit) for limit in (1 << 30, 0))
    for reader in (model, model, small):
        for first, again in zip(plain, reader.capture(tokens, [LAYER])[LAYER], strict=True):
            assert torch.allclose(again, first, atol=1e-5)
    assert len(model._known) == 4, "the fifth text is the first one again"
    assert not small._known
    with model.splice({LAYER: lambda x, y: 0 * y}):
        assert not model.capture(tokens, [LAYER])[LAYER][1].any()
    assert model.capture(tokens, [LAYER])[LAYER][1].any()


@given(st.text(max_size=12))
def test_token_texts_keep_every_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    texts = evidence.token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts) or "\ufffd" in text
    whole = "".join(piece for piece in texts if not (piece.startswith("⟨") and len(piece) == 4))
    assert "⟨" in text or whole == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_half_a_character_shows_its_bytes() -> None:
    tokenizer, shown = byte_tokenizer(), ["a", "⟨F0⟩", "⟨9F⟩", "⟨98⟩", "😀"]
    ids = tokenizer.encode("a😀")
    assert evidence.token_texts(tokenizer, ids) == shown
    assert evidence.token_texts(tokenizer, ids[:3]) == shown[:3]
