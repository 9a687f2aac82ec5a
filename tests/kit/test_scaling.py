"""Planted laws are found again, with and without floor and noise; intervals cover; nonsense is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st

from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import scaling

SIZES = np.array([1.0e6, 1.5e6, 2.0e6, 3.0e6, 4.0e6, 6.0e6])


@given(st.floats(0.0, 0.3), st.floats(0.15, 2.0), st.floats(0.1, 0.6))
def test_a_planted_law_is_found_again(floor: float, b: float, height: float) -> None:
    values = floor + height * (SIZES / SIZES[0]) ** -b
    law = scaling.fit(SIZES, values, n_draws=5)
    np.testing.assert_allclose(law(SIZES), values, rtol=2e-5)
    np.testing.assert_allclose(law(2 * SIZES[-1]), floor + height * (2 * SIZES[-1] / SIZES[0]) ** -b, rtol=5e-3)


def test_floor_and_exponent_are_found_again() -> None:
    law = scaling.fit(SIZES, 0.12 + 0.3 * (SIZES / SIZES[0]) ** -0.8, n_draws=5)
    assert [law.floor, law.b] == [pytest.approx(0.12, abs=1e-3), pytest.approx(0.8, abs=0.01)]


def test_a_law_without_floor_gets_none() -> None:
    values = 0.5 * (SIZES / SIZES[0]) ** -0.3
    assert scaling.fit(SIZES, values, n_draws=5).floor == pytest.approx(0.0, abs=1e-2)
    law = scaling.fit(SIZES, values, floor=False, n_draws=5)
    expected = [0.0, pytest.approx(0.5 * SIZES[0] ** 0.3, rel=1e-3), pytest.approx(0.3, abs=1e-4)]
    assert [law.floor, law.a, law.b] == expected


def test_a_floor_is_never_negative() -> None:
    assert scaling.fit(SIZES, np.linspace(1.0, 0.1, len(SIZES)), n_draws=5).floor >= 0


def planted(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Three seeds at each size, and the mean of three more at 1.5 times the largest."""
    generator = np.random.default_rng(seed)
    sizes = np.repeat([*SIZES, 1.5 * SIZES[-1]], 3)
    values = (0.15 + 0.3 * (sizes / SIZES[0]) ** -0.7) * (1 + noise * generator.standard_normal(len(sizes)))
    return sizes[:-3], values[:-3], float(values[-3:].mean())


def test_intervals_cover_a_new_point_about_as_often_as_they_say() -> None:
    hits, misses = 0, []
    for seed in range(40):
        sizes, values, truth = planted(seed, 0.01)
        mean, low, high = scaling.fit(sizes, values, n_draws=100).predict(1.5 * SIZES[-1], n_seeds=3)
        hits += low <= truth <= high
        misses.append(abs(mean / truth - 1))
    assert 33 <= hits <= 40
    assert np.median(misses) < 0.02


def test_intervals_grow_with_noise_and_distance() -> None:
    widths = []
    for noise in (0.003, 0.03):
        law = scaling.fit(*planted(1, noise)[:2], n_draws=200)
        low, high = law.band([SIZES[2], 4 * SIZES[-1]])
        assert (high - low)[1] > (high - low)[0]
        widths.append((high - low)[1])
        assert law.interval("b")[0] < law.b < law.interval("b")[1]
    assert widths[1] > 3 * widths[0]


def test_fits_are_repeatable() -> None:
    one, two = (scaling.fit(*planted(2, 0.02)[:2], n_draws=50, seed=4) for _ in range(2))
    assert (one.draws == two.draws).all()
    assert one.predict(1e7) == two.predict(1e7)


@pytest.mark.parametrize(
    ("sizes", "values", "sentence"),
    [
        ([1, 2, 3], [3, 2, 1], "4 different sizes or more, not 3"),
        ([1, 1, 1, 2], [3, 2, 1, 1], "4 different sizes or more, not 2"),
        ([1, 2, 3, 4], [3, 2, 1], "4 different sizes or more"),
        ([1, 2, 3, 4], [3, 2, 1, float("nan")], "positive, finite"),
        ([1, 2, 3, 4], [3, 2, 1, 0], "positive, finite"),
    ],
)
def test_points_that_give_no_law_are_refused(sizes: list[float], values: list[float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scaling.fit(sizes, values)


def test_laws_show_every_point_and_held_out_ones_open() -> None:
    sizes = np.array([1e6, 2e6, 3e6, 4e6])
    law = scaling.fit(sizes, 0.1 + 0.2 * (sizes / 1e6) ** -0.5, n_draws=20)
    points = pd.DataFrame({"x": [*sizes, 8e6], "fvu": [*law.values, 0.17], "held_out": [False] * 4 + [True]})
    draw_laws = definitions("10_scaling_laws", "add_line", "short", "draw_laws").draw_laws
    figure = draw_laws(points.assign(line="K = 4", panel="Lorsa"), {"K = 4": law}, "t", "parameters")
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in marks] == [4, 1]
    assert marks[1].marker.color == "white"
    assert figure.layout.xaxis.ticktext[-1] == "8.0M"
