"""Examples: what the pass records is what modules and units say; windows keep what they promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from judged_text import BUDGET, planted_sets
from toys import ToySource, random_lorsa, random_sae, toy_site

from lorsa_utils.autointerp import examples
from lorsa_utils.autointerp.examples import KINDS, WIDTH, Budget, Dictionary, Firings
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import LorsaHeads, SAEFeatures


class Tokens:
    """What the pass asks of a tokenizer."""

    @staticmethod
    def batch_decode(ids: list[list[int]]) -> list[str]:
        return [f" t{index}" for (index,) in ids]


SOURCE = ToySource(n_sequences=30, context=20)
DICTIONARIES = [Dictionary("Lorsa", 0, random_lorsa(1)), Dictionary("SAE", 0, random_sae(2))]


def recorded(dictionaries: list[Dictionary] = DICTIONARIES, units: int = 24, batch_size: int = 7) -> list[Firings]:
    budget = Budget(units=units, oversampling=1)
    return examples.record_firings(SOURCE, dictionaries, {0: toy_site()}, Tokens(), budget, batch_size, progress=False)


def test_everything_active_is_recorded_once_with_its_activation() -> None:
    for firings in recorded():
        module = firings.dictionary.module
        indices, values = module.encode(module.input_from(SOURCE.inputs[0], SOURCE.outputs[0]))
        dense = torch.zeros(*indices.shape[:2], 24).scatter_(2, indices, values)
        dense = (dense.abs() * module.W_O.norm(dim=1) * SOURCE.mask[..., None]).detach().flatten(0, 1).numpy()
        seen = np.zeros_like(dense)
        seen[firings.place, firings.units[firings.number]] = firings.value
        np.testing.assert_allclose(seen, dense, rtol=1e-5)
        assert len(set(zip(firings.number.tolist(), firings.place.tolist(), strict=True))) == len(firings.place)


def test_sources_are_the_largest_masses_of_units() -> None:
    length = SOURCE.context
    kinds = [LorsaHeads(DICTIONARIES[0].module), SAEFeatures(DICTIONARIES[1].module, toy_site())]  # type: ignore[arg-type]
    every_place = torch.eye(length)[:, None, :]
    for firings, units in zip(recorded(), kinds, strict=True):
        for row in range(0, len(firings.place), max(1, len(firings.place) // 25)):
            sequence, position = divmod(int(firings.place[row]), length)
            unit = int(firings.units[firings.number[row]])
            here = slice(sequence, sequence + 1)
            batch = units.prepare(SOURCE.inputs[0][here], SOURCE.outputs[0][here])
            rows = units.rows(batch, 0, torch.tensor([position]), every_place)
            best = (rows.mass[:, 0, unit] / rows.total[0, unit]).detach().topk(examples.N_SOURCES)
            np.testing.assert_allclose(firings.shares[row], best.values, atol=1e-5)
            assert firings.sources[row].tolist() == best.indices.tolist()


def test_the_same_whatever_the_batch_size() -> None:
    for one_by_one, at_once in zip(recorded(batch_size=1), recorded(batch_size=30), strict=True):
        assert one_by_one.place.tolist() == at_once.place.tolist()
        assert one_by_one.number.tolist() == at_once.number.tolist()
        np.testing.assert_allclose(one_by_one.value, at_once.value, rtol=1e-5)


def test_saved_and_read_again(tmp_path: Path) -> None:
    firings, path = recorded(), tmp_path / "firings.safetensors"
    examples.save(path, firings)
    for before, after in zip(firings, examples.load(path, DICTIONARIES, Tokens()), strict=True):
        assert (after.corpus.tokens == before.corpus.tokens).all()
        assert after.corpus.strings == before.corpus.strings
        for name in ("number", "place", "value", "sources", "shares", "similarity"):
            assert (getattr(after, name) == getattr(before, name)).all()


def test_windows_are_what_they_say() -> None:
    for unit in planted_sets().units:
        for windows in (unit.first, unit.second):
            assert set(windows.kind) <= set(KINDS)
            assert (windows.values[~windows.active] == 0).all()
            assert (windows.values[windows.active].max(axis=1) > 0).all()
            assert ((windows.quantile >= 0) == windows.active).all()
            assert windows.tokens.shape[1] == WIDTH
            assert (windows.tokens[np.arange(len(windows)), windows.peak] >= 0).all()
            for row in range(len(windows)):
                n = len(windows.pieces(row))
                assert (windows.tokens[row, :n] > 0).all()
                assert (windows.tokens[row, n:] == -1).all()
        assert unit.second.active.sum() == (~unit.second.active).sum() == BUDGET.scored
        assert unit.first.active.sum() == BUDGET.shown
        marked = unit.first.marked(0, unit.first.values[0] > 0)
        assert "«" in marked
        assert marked.startswith("…") != bool(unit.first.opens[0])


def test_same_token_windows_hold_a_token_the_unit_fires_on_elsewhere() -> None:
    windows = next(unit.first for unit in planted_sets().units if unit.unit == 2)
    active = windows.tokens[windows.active][windows.values[windows.active] > 0]
    near = windows[windows.kind == "same token"]
    assert len(near) > 0
    assert np.isin(near.tokens[np.arange(len(near)), near.peak], active).all()


def test_halves_share_no_sequence() -> None:
    for unit in planted_sets().units:
        # Sequences of the made text share no run of four words but where one word was repeated.
        first, second = ({tuple(row[4:8]) for row in half.tokens if row[7] >= 0} for half in (unit.first, unit.second))
        assert not first & second


def test_quantiles_are_equally_represented() -> None:
    quantile = np.repeat(np.arange(10), 50)
    chosen = examples.spread(quantile, np.arange(500), 30, np.random.default_rng(0))
    assert np.bincount(quantile[chosen]).tolist() == [3] * 10
    assert len(set(chosen.tolist())) == 30


def test_units_without_enough_examples_are_counted_by_reason() -> None:
    firings = recorded()[0]
    few = examples.examples(firings, Budget(units=3, least=2, scored=4, shown=4, contrast=4))
    assert len(few.units) <= 3
    assert few.eligible + sum(few.left_out.values()) == 24
    with pytest.raises(UserError, match="give a longer text"):
        examples.examples(firings, Budget(least=500))
    with pytest.raises(UserError, match="at least one trained module"):
        recorded([])


def test_relatives_are_of_the_same_group_first() -> None:
    similarity = np.array([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.0], [0.1, 0.3, 1.0, 0.8], [0.2, 0.0, 0.8, 1.0]])
    assert examples._relatives(similarity, np.array([-1, -1, -1, -1])) == [1, 0, 3, 2]
    assert examples._relatives(similarity, np.array([0, 1, 0, 1])) == [2, 3, 0, 1]


def test_near_peaks_are_one_example() -> None:
    places = np.array([0, 5, 30, 33, 64, 100])
    values = np.array([1.0, 2.0, 5.0, 4.0, 1.0, 1.0])
    assert places[examples.find_peaks(places, values, 128)].tolist() == [30, 64, 100]
