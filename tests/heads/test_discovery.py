"""A layer built by hand: its known heads are found and named, nothing else is; scores and nulls by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hand_model import KNOWN, known_lorsa

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import discovery, families, prompts
from lorsa_utils.heads.discovery import Discovery
from lorsa_utils.heads.families import Prompts
from lorsa_utils.heads.units import LorsaHeads, MHSAHeads, Removals
from lorsa_utils.lorsa import Lorsa

# ---- planted


def test_every_planted_head_is_named_and_none_invented(found: Discovery) -> None:
    named = {unit: found.families(unit) for unit in range(24) if found.families(unit)}
    assert {unit: names[0] for unit, names in named.items()} == {KNOWN.index(family): family for family in KNOWN}
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
    assert (found.names.query("named")["p"] < discovery.ERROR_RATE).all()
    assert found.names.query("named")["confirmed"].all()


def test_the_same_layer_as_mhsa(hand_made: Any, made: Prompts) -> None:
    found = discovery.discover(hand_made, 0, MHSAHeads(hand_made.site(0)), made.sets, progress=False)
    assert [found.families(unit)[0] for unit in range(4)] == list(KNOWN)
    assert found.null.empty
    assert (found.bars["n_null"] == 0).all()
    assert (found.bars["share"] == found.bars["share_floor"]).all()


def test_a_random_lorsa_scores_as_chance_does(
    hand_made: Any, known: LorsaHeads, texts: list[prompts.Passage], made: Prompts
) -> None:
    text, lorsa = hand_made.sequences(texts), Lorsa(known.lorsa.config.replace(n_ov_heads=300, n_qk_heads=30, k=30))
    null = discovery.random_lorsa(lorsa, hand_made, 0, text.tokens.long(), text.mask)
    found = discovery.discover(hand_made, 0, LorsaHeads(null), made.sets, progress=False)
    means = found.scores.groupby("family")["auc"].mean()
    assert set(means.index) == set(families.FAMILIES)
    assert means.between(0.45, 0.55).all(), means
    named = found.names.query("named")
    assert set(named["family"]) <= {"attention_sink", "local"}, "names that only describe a place"


def test_removing_a_head_takes_its_effect_away(hand_made: Any, known: LorsaHeads, made: Prompts) -> None:
    removals = Removals(hand_made, 0, made.sets["successor"])
    table = removals.effects(known, {"successor": [3], "random": [10]}).set_index("removed")
    assert table.loc["successor", "labelled"] > 10 * abs(table.loc["random", "labelled"])
    assert abs(table.loc["successor", "controls"]) < 1e-3


def test_all_heads_dead_and_sets_that_cannot_be_scored(hand_made: Any, made: Prompts) -> None:
    lorsa, induction = known_lorsa(hand_made), made.sets["induction"]
    with torch.no_grad():
        lorsa.W_V.zero_()
        lorsa.b_V.zero_()
    heads = LorsaHeads(lorsa)
    found = discovery.discover(hand_made, 0, heads, {"induction": induction}, progress=False)
    assert found.counts() == {"induction": 0}
    with pytest.raises(UserError, match="'telepathy' is unknown"):
        discovery.discover(hand_made, 0, heads, {"telepathy": induction})
    with pytest.raises(UserError, match="No labelled position of family induction is left; make more prompts"):
        discovery.discover(hand_made, 0, heads, {"induction": induction.where(induction.pair == 0)}, progress=False)


# ---- bars and nulls


def test_the_null_raises_the_bar_until_it_keeps_its_rate() -> None:
    def scores(shares: list[float]) -> Any:
        n = len(shares)
        return pd.DataFrame({"share": shares, "precision": [0.9] * n, "logit": [np.nan] * n, "support": [20.0] * n})

    low = discovery._bars("induction", scores([0.4] * 3000))
    assert (low["share"], low["null_rate"], low["n_null"]) == (0.5, 0.0, 3000)
    raised = discovery._bars("induction", scores([0.1] * 2996 + [0.6, 0.7, 0.8, 0.9]))
    assert 0.6 < raised["share"] < 0.6001, "three of three thousand may clear it"
    assert raised["null_rate"] == pytest.approx(4 / 3000)
    sinks = discovery._bars("attention_sink", scores([0.9] * 100))
    assert (sinks["share"], sinks["null_rate"]) == (0.5, 1.0)


def test_random_sources(made: Prompts) -> None:
    for sets in made.sets.values():
        drawn = discovery._random_sources(sets, torch.Generator().manual_seed(0))
        assert not (drawn & sets.sources).any()
        assert not (drawn & (torch.arange(drawn.shape[1]) > sets.position[:, None])).any()
        assert (drawn.sum(dim=1) <= sets.sources.sum(dim=1)).all()


def test_kinds_are_scored_together_as_they_are_alone(hand_made: Any, known: LorsaHeads, made: Prompts) -> None:
    others: dict[str, Any] = {"MHSA": MHSAHeads(hand_made.site(0)), "again": known}
    few = {name: made.sets[name] for name in ("induction", "previous_token")}
    sets = {name: prompt_set.where(prompt_set.pair < 12) for name, prompt_set in few.items()}
    together = discovery.discover(hand_made, 0, known, sets, others=others, progress=False)
    assert list(together.others) == ["MHSA", "again"]
    for name, some in sets.items():
        for number, (half, part) in enumerate(zip(("discovery", "confirmation"), some.halves(), strict=True)):
            for kind, each in [(None, known), *others.items()]:
                alone = discovery.read(hand_made, 0, {"units": each}, part, seed=number)["units"].scores
                pd.testing.assert_frame_equal(together.halves(name, kind)[half], alone, check_names=False)
    apart = discovery.discover(hand_made, 0, known, sets, progress=False)
    pd.testing.assert_frame_equal(apart.names, together.names)
    assert apart.others == {}
    assert apart.null.empty
