"""A layer built by hand: its known heads are found and named, nothing else is; scores and nulls by hand and by property."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hand_model import KNOWN, HandModel, known_lorsa
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import word_tokenizer

from lorsa_utils import stats
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families, prompts, units
from lorsa_utils.heads.families import FAMILIES, Discovery
from lorsa_utils.heads.prompts import Prompts, Vocabulary
from lorsa_utils.lorsa import Lorsa


@pytest.fixture(scope="module")
def model() -> HandModel:
    tokenizer = word_tokenizer()
    return HandModel(Vocabulary(tokenizer, tokenizer.bos_token_id))


@pytest.fixture(scope="module")
def texts(model: HandModel) -> list[prompts.Passage]:
    rng = random.Random(0)
    words = [model.vocabulary.texts[token] for token in model.vocabulary.words]
    documents = [(f"d{i}", "".join(rng.choices(words, k=200))) for i in range(30)]
    return prompts.passages(documents, model.vocabulary, 48, 64)


@pytest.fixture(scope="module")
def made(model: HandModel, texts: list[prompts.Passage]) -> Prompts:
    return prompts.standard(model.vocabulary, texts, scale=0.75)


def random_heads(model: Any, lorsa: Lorsa, texts: list[prompts.Passage]) -> units.LorsaHeads:
    tokens = torch.tensor([model.vocabulary.start + list(passage.ids) for passage in texts])
    return units.LorsaHeads(families.random_lorsa(lorsa, model, 0, tokens, tokens != model.vocabulary.bos_id))


@pytest.fixture(scope="module")
def found(model: Any, texts: list[prompts.Passage], made: Prompts) -> Discovery:
    lorsa = known_lorsa(model)
    null = random_heads(model, lorsa, texts)
    return families.discover(model, 0, units.LorsaHeads(lorsa), made.sets, null, skipped=made.skipped, progress=False)


# ---- planted


def test_every_planted_head_is_named_and_none_invented(found: Discovery) -> None:
    named = {unit: found.families(unit) for unit in range(24) if found.families(unit)}
    assert {unit: families[0] for unit, families in named.items()} == {KNOWN.index(family): family for family in KNOWN}
    assert named[1] == ["previous_token", "local"]
    assert named[3][0] == "successor"
    assert found.counts()["induction"] == 1
    assert not found.skipped


def test_what_a_name_rests_on(found: Discovery) -> None:
    induction = found.scores.query("family == 'induction' and half == 'confirmation'").set_index("unit").loc[0]
    assert induction["share"] > 0.99
    assert induction["precision"] > 0.99
    assert induction["recall"] == induction["auc"] == 1
    successor = found.names.query("family == 'successor' and named")
    assert set(successor["unit"]) == {3}
    assert "days" in set(successor["series"])
    assert set(successor["series"]) <= {"", "days"}, "it knows days alone"
    assert (found.names.query("named")["p"] < families.ERROR_RATE).all()
    assert found.names.query("named")["confirmed"].all()


def test_the_same_layer_as_mhsa(model: Any, made: Prompts) -> None:
    found = families.discover(model, 0, units.MHSAHeads(model.site(0)), made.sets, progress=False)
    assert [found.families(unit)[0] for unit in range(4)] == list(KNOWN)
    assert found.null.empty
    assert (found.bars["n_null"] == 0).all()
    assert (found.bars["share"] == found.bars["share_floor"]).all()


def test_a_random_lorsa_scores_as_chance_does(model: Any, texts: list[prompts.Passage], made: Prompts) -> None:
    config = known_lorsa(model).config.replace(n_ov_heads=600, n_qk_heads=60, k=60)
    null = random_heads(model, Lorsa(config), texts)
    found = families.discover(model, 0, null, made.sets, progress=False)
    means = found.scores.groupby("family")["auc"].mean()
    assert len(means) == 11
    assert means.between(0.45, 0.55).all(), means
    named = found.names.query("named")
    assert set(named["family"]) <= {"attention_sink", "local"}, "names that only describe a place"


def test_removing_a_head_takes_its_effect_away(model: Any, made: Prompts) -> None:
    lorsa = known_lorsa(model)
    sets = made.sets["successor"]
    table = (
        units.Removals(model, 0, sets)
        .effects(units.LorsaHeads(lorsa), {"successor": [3], "random": [10]})
        .set_index("removed")
    )
    assert table.loc["successor", "labelled"] > 10 * abs(table.loc["random", "labelled"])
    assert abs(table.loc["successor", "controls"]) < 1e-3


def test_all_heads_dead(model: Any, made: Prompts) -> None:
    lorsa = known_lorsa(model)
    with torch.no_grad():
        lorsa.W_V.zero_()
        lorsa.b_V.zero_()
    found = families.discover(model, 0, units.LorsaHeads(lorsa), {"induction": made.sets["induction"]}, progress=False)
    assert found.counts() == {"induction": 0}


def test_unknown_family(model: Any, made: Prompts) -> None:
    with pytest.raises(UserError, match="'telepathy' is unknown"):
        families.discover(model, 0, units.LorsaHeads(known_lorsa(model)), {"telepathy": made.sets["induction"]})


# ---- statistics


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=8),
)
def test_auc_is_the_chance_of_a_larger_value(high: list[list[int]], low: list[list[int]]) -> None:
    labelled, controls = torch.tensor(high).float(), torch.tensor(low).float()
    expected = ((labelled[:, None] > controls).double() + 0.5 * (labelled[:, None] == controls).double()).mean(
        dim=(0, 1)
    )
    assert torch.allclose(stats.auc(labelled, controls, columns=2), expected)


def test_holm_by_hand() -> None:
    assert stats.holm(np.array([0.04, 0.001, 0.03, 0.012]), 0.05).tolist() == [False, True, False, True]
    assert stats.holm(np.array([0.01, 0.02]), 0.05).tolist() == [True, True]
    assert stats.holm(np.array([]), 0.05).tolist() == []


def test_sign_flips_are_exact_where_they_can_be_counted() -> None:
    differences = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]).double()
    p = stats.sign_flip_p(differences, 0, 20_000)
    assert p == pytest.approx([1 / 16, 5 / 16, 1.0], abs=0.02)


def test_sign_flips_hold_their_rate() -> None:
    noise = torch.randn(24, 2000, generator=torch.Generator().manual_seed(0)).double()
    assert (stats.sign_flip_p(noise, 1, 2000) <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_the_null_raises_the_bar_until_it_keeps_its_rate() -> None:
    def scores(shares: list[float]) -> Any:
        n = len(shares)
        return pd.DataFrame({"share": shares, "precision": [0.9] * n, "logit": [np.nan] * n, "support": [20.0] * n})

    low = families._bars("induction", scores([0.4] * 3000))
    assert (low["share"], low["null_rate"], low["n_null"]) == (0.5, 0.0, 3000)
    raised = families._bars("induction", scores([0.1] * 2996 + [0.6, 0.7, 0.8, 0.9]))
    assert 0.6 < raised["share"] < 0.6001, "three of three thousand may clear it"
    assert raised["null_rate"] == pytest.approx(4 / 3000)
    sinks = families._bars("attention_sink", scores([0.9] * 100))
    assert (sinks["share"], sinks["null_rate"]) == (0.5, 1.0)


def test_random_sources(made: Prompts) -> None:
    for each in made.sets.values():
        drawn = families._random_sources(each, torch.Generator().manual_seed(0))
        assert not (drawn & each.sources).any()
        assert not (drawn & (torch.arange(drawn.shape[1]) > each.position[:, None])).any()
        assert (drawn.sum(dim=1) <= each.sources.sum(dim=1)).all()


def test_order_of_names_covers_the_families(made: Prompts) -> None:
    assert set(FAMILIES) == set(made.sets)


# ---- comparing


def test_compare_chooses_on_one_half_and_shows_the_other(found: Discovery) -> None:
    def scores(half: str) -> Any:
        return found.scores.query("family == 'induction' and half == @half").set_index("unit")[[*families.SCORES]]

    halves = {half: scores(half) for half in ("discovery", "confirmation")}
    best = families.compare({"Lorsa heads": halves, "again": halves}, n=2)
    assert best.groupby("kind")["unit"].first().to_dict() == {"Lorsa heads": 0, "again": 0}
    assert best.loc[0, "f1"] == pytest.approx(1, abs=1e-3)
    without = halves["confirmation"].assign(precision=np.nan)
    assert families.f1(without)[0] == pytest.approx(1, abs=1e-2)


def test_how_much_the_first_heads_carry(model: Any, made: Prompts) -> None:
    lorsa, mhsa = units.LorsaHeads(known_lorsa(model)), units.MHSAHeads(model.site(0))
    second = families.halves(made.sets["successor"])[1]
    table = families.carried(
        model, 0, {"Lorsa": (lorsa, [3, 7, 8]), "MHSA": (mhsa, [3])}, mhsa, second, tops=(1, 3)
    ).set_index(["kind", "top"])
    assert table.index.tolist() == [("Lorsa", "1"), ("Lorsa", "3"), ("MHSA", "1"), ("whole layer", "all")]
    assert table.loc[("whole layer", "all"), "share"] == 1
    assert table.loc[("Lorsa", "1"), "labelled"] == pytest.approx(table.loc[("MHSA", "1"), "labelled"], rel=1e-3)
    whole = table.loc[("whole layer", "all"), "labelled"]
    assert np.allclose(table["share"], table["labelled"] / whole)


def test_kinds_are_scored_together_as_they_are_alone(model: Any, made: Prompts) -> None:
    lorsa = units.LorsaHeads(known_lorsa(model))
    kinds: dict[str | None, Any] = {None: lorsa, "MHSA": units.MHSAHeads(model.site(0)), "again": lorsa}
    sets = {name: made.sets[name] for name in ("induction", "previous_token")}
    others = {name: each for name, each in kinds.items() if name}
    together = families.discover(model, 0, lorsa, sets, others=others, progress=False)
    assert list(together.others) == ["MHSA", "again"]
    for name, some in sets.items():
        for number, (half, part) in enumerate(zip(("discovery", "confirmation"), families.halves(some), strict=True)):
            for kind, each in kinds.items():
                alone = families.score(families.read(model, 0, {"units": each}, part, seed=number)["units"])
                pd.testing.assert_frame_equal(together.halves(name, kind)[half], alone, check_names=False)
    apart = families.discover(model, 0, lorsa, sets, progress=False)
    pd.testing.assert_frame_equal(apart.names, together.names)
    assert apart.others == {}
    assert apart.null.empty
