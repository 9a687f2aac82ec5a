"""The explorer: its numbers against the module, steering against the untouched model, and widgets that react."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_heads import DEAD, LAYER, LENGTH, Tiny

from lorsa_utils.exceptions import UserError
from lorsa_utils.view import evidence, pages
from lorsa_utils.view.explorer import Explorer, View, choose_heads, marked_tokens

SENTENCE = "The cat sat on the mat. The cat"


@pytest.fixture(scope="module")
def view(tiny: Tiny) -> View:
    table = pd.concat([pd.DataFrame({"head": range(24)}), tiny.found.facts], axis=1)
    table["family"] = table["families"] = ["induction", "", "local", *[""] * 21]
    table.loc[0, "families"] = "induction; local"
    table["top_logits"] = [[f"t{head}", "Cat"] if head < 3 else ["x"] for head in range(24)]
    return View(tiny.model, LAYER, tiny.lorsa, table, 256, LENGTH)


@pytest.fixture
def explorer(view: View) -> Explorer:
    other = dataclasses.replace(view, layer=0, table=view.table.assign(family="", families=""))
    return Explorer([view, other], SENTENCE)


def test_choose_heads(view: View) -> None:
    alive = choose_heads(view.table)
    assert DEAD not in alive["head"].tolist()
    assert alive["frequency"].is_monotonic_decreasing
    assert len(choose_heads(view.table, dead=True)) == 24
    for options, chosen in (
        ({"family": "local"}, {0, 2}),
        ({"family": "-"}, set(alive["head"]) - {0, 2}),
        ({"search": "7"}, {7}),  # a number is a head, not a piece of a token
        ({"search": " cat "}, {0, 1, 2}),
        ({"search": "nothing like it"}, set()),
    ):
        assert set(choose_heads(view.table, **options)["head"]) == chosen
    assert choose_heads(view.table, order="head")["head"].is_monotonic_increasing
    assert choose_heads(view.table, order="max_activation")["max_activation"].is_monotonic_decreasing


def test_a_sentence_is_read_as_the_module_reads_it(tiny: Tiny, view: View) -> None:
    read = view.read(SENTENCE)
    assert "".join(read.tokens[1:]) == SENTENCE
    x, _ = tiny.model.capture(torch.tensor([read.ids]), [LAYER])[LAYER]
    indices, values = tiny.lorsa.encode(x)
    norms, position = tiny.lorsa.W_O.norm(dim=1), 12
    firing = view.firing(read, position)
    sizes = dict(zip(indices[0, position].tolist(), (values * norms[indices])[0, position].tolist(), strict=True))
    kept = {head: size for head, size in sizes.items() if size > 0}
    assert dict(zip(firing["head"], firing["activation"], strict=True)) == pytest.approx(kept, abs=1e-5)
    assert firing["activation"].is_monotonic_decreasing
    head = int(firing["head"].iloc[0])
    context = view.context_of(read, head, position)
    assert context.tokens == read.tokens
    assert torch.allclose(context.z_pattern, tiny.lorsa.z_pattern(x, head)[0] * norms[head], atol=1e-5)
    main = [read.tokens[source] for source in evidence.main_sources(context.z_pattern[position])[:2]]
    assert firing["looks_at"].iloc[0] == main
    tokens = marked_tokens(context, position)
    assert [token["text"] for token in tokens] == [pages.visible(token) for token in read.tokens]
    assert [place for place, token in enumerate(tokens) if "here" in token["classes"]] == [position]


def test_sentences_that_are_too_long_or_empty_or_strange(view: View, explorer: Explorer) -> None:
    long = view.read("word " * 200)
    assert len(long.ids) == LENGTH
    assert long.n_cut == 1 + 5 * 200 - LENGTH
    with pytest.raises(UserError, match="type a sentence"):
        view.read("")
    with pytest.raises(UserError, match="choose one from 0 to 23"):
        view.context_of(long, 24, 3)
    with pytest.raises(UserError, match="no layer to explore"):
        Explorer([], SENTENCE)
    before = explorer.shown.value
    for sentence, shown in (
        ("", "nothing to read yet"),
        ("word " * 200, f"Only the first {LENGTH} tokens are read"),
        ("שלום <script>alert(1)</script> 😀", "😀"),
    ):
        explorer.sentence.value = sentence
        assert shown in explorer.shown.value
    assert "<script" not in explorer.shown.value
    explorer.sentence.value = SENTENCE
    assert explorer.shown.value == before


def test_steering_tells_probabilities(tiny: Tiny, view: View) -> None:
    ids, head = tiny.sequences.tokens[1, :40].tolist(), int(tiny.found.facts["frequency"].idxmax())
    probabilities = tiny.model.logits(torch.tensor([ids]))[0].softmax(dim=1).amax(dim=1)
    changes = view.steer(ids, {head: 6.0}, n=5)
    assert changes["before"].max() == pytest.approx(float(probabilities[-1]), abs=1e-5)
    assert 5 <= len(changes) <= 10
    assert changes[["before", "after"]].max(axis=1).is_monotonic_decreasing
    assert np.abs(changes["after"] - changes["before"]).max() > 1e-3
    for nothing in ({head: 1.0}, {DEAD: 8.0}):
        same = view.steer(ids, nothing)
        assert (same["before"] == same["after"]).all(), "scale 1 and a dead head change nothing"
    with pytest.raises(UserError, match="no unit 99"):
        view.steer(ids, {99: 0.0})
    first = view.steer(ids, {head: 0.0}, position=3)
    assert first["before"].max() == pytest.approx(float(probabilities[3]), abs=1e-5)


def test_widgets_react(explorer: Explorer) -> None:
    assert explorer.heads.value == explorer.head.value == int(explorer.listed["head"].iloc[0])
    explorer.family.value = "local"
    assert {value for _, value in explorer.heads.options} == {0, 2}
    assert explorer.head.value in (0, 2), "the chosen head is one of those listed"
    assert "2 of 24 heads" in explorer.count.value
    explorer.heads.value = 2
    assert "Head 2 at" in explorer.shown.value
    assert "Head 2 times 0" in explorer.effect.value
    shown, effect = explorer.shown.value, explorer.effect.value
    explorer.token.value = 5
    assert explorer.shown.value != shown
    assert explorer.effect.value != effect
    explorer.scale.value = 1.0
    changes = explorer.changes
    assert (changes["before"] == changes["after"]).all()
    explorer.sentence.value = "Another sentence"
    assert explorer.token.value == explorer.token.max == len("Another sentence")
    explorer.search.value = "no such token"
    assert explorer.heads.options == ()
    explorer.search.value = ""
    explorer.family.value = ""
    explorer.layer.value = 0
    assert explorer.view.layer == 0
    assert explorer.context.tokens[1:] == list("Another sentence")
