"""Power laws with an irreducible part, their uncertainty, and what they predict.

    value(n) = floor + a n^-b,    floor >= 0, a >= 0, b > 0

The fit minimises squares of the relative error (fit - value) / value. For a given b, the best floor and a solve two
linear equations (either is 0 where it would be negative); b is searched on a grid that narrows around the best one.

Intervals are a bootstrap of relative residuals, enlarged for the fitted parameters: they are redrawn onto the fitted
curve and the law is refitted. Intervals cover the scatter of seeds and what the law misses at the fitted sizes, not
what changes beyond the largest. All draws are fitted at once, which is why the search is written out here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorsa_utils.exceptions import UserError
from lorsa_utils.stats import Interval, percentile_interval

Floats = npt.NDArray[np.float64]
EXPONENTS = (0.05, 4.0)


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law and its bootstrap. Made by `fit`."""

    floor: float
    a: float
    b: float
    sizes: Floats
    """[n_points]"""
    values: Floats
    """[n_points]"""
    draws: Floats
    """[n_draws, 3]: bootstrapped floor, a (at n = `scale`) and b."""
    scale: float
    """Geometric mean of the sizes."""
    spread: Floats
    """Enlarged relative residuals, [n_points]."""

    def __call__(self, n: npt.ArrayLike) -> Floats:
        """The law at sizes n."""
        return np.asarray(self.floor + self.a * np.asarray(n, dtype=float) ** -self.b)

    def band(self, n: npt.ArrayLike) -> tuple[Floats, Floats]:
        """95 % interval of the curve at sizes n: lower and upper bound, each shaped as n."""
        curves = _curve(self.draws, np.atleast_1d(np.asarray(n, dtype=float)) / self.scale)
        low, high = np.quantile(curves, [0.025, 0.975], axis=0)
        return low, high

    def predict(self, n: float, n_seeds: int = 1, seed: int = 0) -> Interval:
        """Interval of the mean of `n_seeds` new runs of size n."""
        noise = np.random.default_rng(seed).choice(self.spread, size=(len(self.draws), n_seeds)).mean(axis=1)
        return percentile_interval(float(self(n)), _curve(self.draws, np.array([n / self.scale]))[:, 0] * (1 + noise))

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of `floor` or `b`."""
        return percentile_interval(0.0, self.draws[:, {"floor": 0, "b": 2}[name]])[1:]


def fit(
    sizes: npt.ArrayLike, values: npt.ArrayLike, *, floor: bool = True, n_draws: int = 1000, seed: int = 0
) -> PowerLaw:
    """Fit a power law to values [n_points] at sizes [n_points], with or without an irreducible part (`floor`).

    Points of one size are seeds.

    Raises:
        UserError: too few different sizes, or values that are not positive and finite.
    """
    n, y = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    least = 4 if floor else 3
    if n.shape != y.shape or n.ndim != 1 or len(np.unique(n)) < least:
        raise UserError(
            f"A power law needs values at {least} different sizes or more, not {len(np.unique(n))}; run more sizes."
        )
    if not (np.isfinite(n).all() and np.isfinite(y).all() and (n > 0).all() and (y > 0).all()):
        raise UserError("A power law needs positive, finite sizes and values; leave out runs that diverged.")
    scale = float(np.exp(np.log(n).mean()))
    best = _fit(n / scale, y[None], y, floor)
    fitted = _curve(best, n / scale)[0]
    residuals = (y - fitted) / fitted * np.sqrt(len(y) / max(1, len(y) - (3 if floor else 2)))
    drawn = np.random.default_rng(seed).choice(residuals - residuals.mean(), size=(n_draws, len(y)))
    draws = _fit(n / scale, fitted * (1 + drawn), y, floor)
    level, height, b = best[0]
    return PowerLaw(float(level), float(height * scale**b), float(b), n, y, draws, scale, residuals)


def _curve(parameters: Floats, x: Floats) -> Floats:
    """Laws [n_laws, 3] at relative sizes x [n_points]: [n_laws, n_points]."""
    return np.asarray(parameters[:, :1] + parameters[:, 1:2] * x[None] ** -parameters[:, 2:])


def _fit(x: Floats, y: Floats, size: Floats, floor: bool) -> Floats:
    """Best floor, a and b for rows of values: x [n_points], y [n_rows, n_points], weights 1 / size^2; [n_rows, 3]."""
    rows = np.arange(len(y))
    low, high = (np.full(len(y), np.log(end)) for end in EXPONENTS)
    for _ in range(4):  # each round narrows 40 steps to 2
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)
        b = np.exp(grid)
        *parameters, errors = _solve(x, y[:, None], 1 / size**2, b, floor)
        best = rows, errors.argmin(axis=1)
        step, centre = (high - low) / 40, grid[best]
        low, high = np.maximum(centre - step, np.log(EXPONENTS[0])), np.minimum(centre + step, np.log(EXPONENTS[1]))
    return np.stack([side[best] for side in (*parameters, b)], axis=1)


def _solve(x: Floats, y: Floats, weights: Floats, b: Floats, floor: bool) -> tuple[Floats, Floats, Floats]:
    """Weighted least squares of y [..., n_points] on a constant and x^-b, neither negative, for every b.

    Constant, slope and error, each shaped as b.
    """
    basis = x ** -b[..., None]
    total, s, ss = weights.sum(), (weights * basis).sum(axis=-1), (weights * basis**2).sum(axis=-1)
    t, st = (weights * y).sum(axis=-1), (weights * basis * y).sum(axis=-1)
    level = np.maximum((ss * t - s * st) / np.maximum(total * ss - s**2, 1e-300), 0.0) if floor else np.zeros_like(s)
    height = (st - level * s) / ss
    flat = height < 0
    height = np.where(flat, 0.0, height)
    level = np.where(flat, t / total, level) if floor else level
    error = (weights * (level[..., None] + height[..., None] * basis - y) ** 2).sum(axis=-1)
    return level, height, error
