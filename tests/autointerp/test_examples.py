"""Examples: what the pass records is what modules and units say; windows keep what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from judged_text import BUDGET, planted_sets
from toys import ToySource, random_lorsa, random_sae, toy_site

from lorsa_utils.autointerp import examples
from lorsa_utils.autointerp.examples import KINDS, WIDTH, Budget, Dictionary
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import LorsaHeads, SAEFeatures
from lorsa_utils.lorsa import Lorsa


class Tokens:
    """What `collect` asks of a tokenizer."""

    @staticmethod
    def batch_decode(ids: list[list[int]]) -> list[str]:
        return [f" t{one}" for (one,) in ids]


@pytest.fixture(scope="module")
def source() -> ToySource:
    return ToySource(n_sequences=30, context=20)


@pytest.fixture(scope="module")
def dictionaries() -> list[Dictionary]:
    return [Dictionary("Lorsa", 0, random_lorsa(1)), Dictionary("SAE", 0, random_sae(2))]


def collected(
    source: ToySource, dictionaries: list[Dictionary], units: int = 24
) -> tuple[examples.Text, list[examples.Firings]]:
    return examples.collect(
        source, dictionaries, {0: toy_site()}, Tokens(), Budget(units=units, oversampling=1), 7, progress=False
    )


def test_everything_active_is_recorded_once_with_its_activation(
    source: ToySource, dictionaries: list[Dictionary]
) -> None:
    _, firings = collected(source, dictionaries)
    for one, dictionary in zip(firings, dictionaries, strict=True):
        module = dictionary.module
        read = source.inputs[0] if isinstance(module, Lorsa) else source.outputs[0]
        indices, values = module.encode(read)
        dense = torch.zeros(*indices.shape[:2], 24).scatter_(2, indices, values)
        dense = (dense.abs() * module.W_O.norm(dim=1) * source.mask[..., None]).detach().flatten(0, 1).numpy()
        found = np.zeros_like(dense)
        found[one.place, one.units[one.unit]] = one.value
        np.testing.assert_allclose(found, dense, rtol=1e-5)
        assert len(set(zip(one.unit.tolist(), one.place.tolist(), strict=True))) == len(one.place)


def test_sources_are_the_largest_masses_of_units(source: ToySource, dictionaries: list[Dictionary]) -> None:
    _, firings = collected(source, dictionaries)
    length = source.context
    # type: ignore[arg-type]
    kinds = [LorsaHeads(dictionaries[0].module), SAEFeatures(dictionaries[1].module, toy_site())]
    every_place = torch.eye(length)[:, None, :]
    for one, units in zip(firings, kinds, strict=True):
        for row in range(0, len(one.place), max(1, len(one.place) // 25)):
            sequence, position = divmod(int(one.place[row]), length)
            unit = int(one.units[one.unit[row]])
            batch = units.prepare(source.inputs[0][sequence : sequence + 1], source.outputs[0][sequence : sequence + 1])
            rows = units.rows(batch, 0, torch.tensor([position]), every_place)
            shares = (rows.mass[:, 0, unit] / rows.total[0, unit]).detach()
            best = shares.topk(examples.N_SOURCES)
            np.testing.assert_allclose(one.shares[row], best.values, atol=1e-5)
            assert one.sources[row].tolist() == best.indices.tolist()


def test_the_same_whatever_the_batch_size(source: ToySource, dictionaries: list[Dictionary]) -> None:
    one, other = (
        examples.collect(
            source, dictionaries, {0: toy_site()}, Tokens(), Budget(units=5, oversampling=2), size, progress=False
        )[1]
        for size in (1, 30)
    )
    for a, b in zip(one, other, strict=True):
        assert a.place.tolist() == b.place.tolist()
        assert a.unit.tolist() == b.unit.tolist()
        np.testing.assert_allclose(a.value, b.value, rtol=1e-5)


def test_kept_on_disk_and_read_again(source: ToySource, dictionaries: list[Dictionary], tmp_path: Path) -> None:
    text, firings = collected(source, dictionaries)
    examples.save(tmp_path / "firings.safetensors", text, firings)
    again, read = examples.load(tmp_path / "firings.safetensors", dictionaries, Tokens())
    assert (again.tokens == text.tokens).all()
    assert again.strings == text.strings
    assert all(
        (a.value == b.value).all() and (a.sources == b.sources).all() for a, b in zip(firings, read, strict=True)
    )
    with pytest.raises(UserError, match="made of other dictionaries"):
        examples.load(tmp_path / "firings.safetensors", dictionaries[:1], Tokens())


def test_windows_are_what_they_say() -> None:
    text, one = planted_sets()
    for unit in one.units:
        for windows in (unit.first, unit.second):
            assert set(windows.kind) <= set(KINDS)
            silent = ~windows.active
            assert (windows.values[silent] == 0).all()
            assert (windows.values[windows.active].max(axis=1) > 0).all()
            assert ((windows.quantile >= 0) == windows.active).all()
            assert windows.tokens.shape[1] == WIDTH
            assert (windows.tokens[np.arange(len(windows)), windows.peak] >= 0).all()
            for row in range(len(windows)):
                n = len(windows.pieces(row, text.strings))
                assert (windows.tokens[row, :n] > 0).all()
                assert (windows.tokens[row, n:] == -1).all()
        assert unit.second.active.sum() == BUDGET.scored
        assert (~unit.second.active).sum() == BUDGET.scored
        assert unit.first.active.sum() == BUDGET.shown


def test_same_token_windows_hold_a_token_the_unit_fires_on_elsewhere() -> None:
    _, one = planted_sets()
    comes_again = next(unit for unit in one.units if unit.unit == 2)
    windows = comes_again.first
    active = windows.tokens[windows.active][windows.values[windows.active] > 0]
    near = windows[windows.kind == "same token"]
    assert len(near) > 0
    assert np.isin(near.tokens[np.arange(len(near)), near.peak], active).all()


def test_halves_share_no_sequence() -> None:
    _, one = planted_sets()
    for unit in one.units:
        # Sequences of the made text share no run of four words but where one word was repeated.
        firsts = {tuple(row[4:8]) for row in unit.first.tokens if row[7] >= 0}
        seconds = {tuple(row[4:8]) for row in unit.second.tokens if row[7] >= 0}
        assert not firsts & seconds


def test_quantiles_are_equally_represented() -> None:
    quantile = np.repeat(np.arange(10), 50)
    chosen = examples._evenly(quantile, np.arange(500), 30, np.random.default_rng(0))
    assert np.bincount(quantile[chosen]).tolist() == [3] * 10
    assert len(set(chosen.tolist())) == 30


def test_units_without_enough_examples_are_counted_by_reason(source: ToySource, dictionaries: list[Dictionary]) -> None:
    text, firings = collected(source, dictionaries)
    made = examples.examples(firings[0], text, Budget(units=3, least=2, scored=4, shown=4, contrast=4))
    assert len(made.units) <= 3
    assert made.eligible + sum(made.left_out.values()) == 24
    with pytest.raises(UserError, match="give a longer text"):
        examples.examples(firings[0], text, Budget(least=500))


def test_relatives_are_of_the_same_group_first() -> None:
    similarity = np.array([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.0], [0.1, 0.3, 1.0, 0.8], [0.2, 0.0, 0.8, 1.0]])
    assert examples._relatives(similarity, np.array([-1, -1, -1, -1])) == [1, 0, 3, 2]
    assert examples._relatives(similarity, np.array([0, 1, 0, 1])) == [2, 3, 0, 1]


def test_relatives_are_of_the_same_family_where_it_is_known() -> None:
    text, _ = planted_sets()
    firings = examples.planted(text, [(text.tokens % 7 == number) & text.mask for number in range(4)], [0] * 4)
    families = {0: "even", 1: "odd", 2: "even", 3: "odd"}
    made = examples.examples(firings, text, BUDGET, families=families)
    assert len(made.units) == 4
    for index, relative in enumerate(made.relatives):
        assert index != relative
        assert families[made.units[index].unit] == families[made.units[relative].unit]


def test_near_peaks_are_one_example() -> None:
    places = np.array([0, 5, 30, 33, 64, 100])
    values = np.array([1.0, 2.0, 5.0, 4.0, 1.0, 1.0])
    assert places[examples._peaks(places, values, 128)].tolist() == [30, 64, 100]


def test_nothing_to_explain_is_refused(source: ToySource) -> None:
    with pytest.raises(UserError, match="at least one trained module"):
        collected(source, [])


def test_marks_and_cuts_are_shown() -> None:
    text, one = planted_sets()
    windows = one.units[0].first
    marked = windows.marked(0, text.strings, windows.values[0] > 0)
    assert "«" in marked
    assert marked.startswith("…") != bool(windows.opens[0])
