"""Intervals, permutation tests, a correction for many tests, and ranks; random draws follow the given seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats as scipy_stats
from torch import Tensor

N_DRAWS = 1000
"""Of a bootstrap."""
N_FLIPS = 20_000
"""Of a sign-flip test."""


class Interval(NamedTuple):
    """A value and its 95 % interval; bounds are NaN if the sample is too small."""

    value: float
    low: float = math.nan
    high: float = math.nan


def percentile_interval(value: float, draws: np.ndarray | Tensor) -> Interval:
    """The middle 95 % of bootstrap draws [n_draws], ignoring NaN."""
    return Interval(float(value), *np.nanquantile(np.asarray(draws, dtype=np.float64), [0.025, 0.975]).tolist())


def sample_interval(draws: Tensor) -> Interval:
    """The interval of [n_draws + 1] values: the sample's, then bootstrap draws."""
    return percentile_interval(float(draws[0]), draws[1:])


def bootstrap_mean(values: np.ndarray, seed: int = 0, n_draws: int = N_DRAWS) -> Interval:
    """Mean with its bootstrap interval, ignoring NaN."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(math.nan)
    draws = np.random.default_rng(seed).choice(values, (n_draws, len(values))).mean(axis=1)
    return percentile_interval(values.mean(), draws)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval; no bounds for fewer than two values or one that is not finite."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2 or not math.isfinite(mean):
        return Interval(mean)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(scipy_stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def permutation_p(a: np.ndarray, b: np.ndarray, seed: int = 0, n_draws: int = 10_000) -> float:
    """Two-sided permutation p of the difference of means of independent samples."""
    both, size = np.concatenate([a, b]), len(a)
    observed = abs(a.mean() - b.mean())
    order = np.random.default_rng(seed).random((n_draws, len(both))).argsort(axis=1)
    first = both[order[:, :size]].sum(axis=1)
    differences = np.abs(first / size - (both.sum() - first) / len(b))
    return float((1 + (differences >= observed - 1e-12).sum()) / (1 + n_draws))


def paired_p(differences: np.ndarray, seed: int = 0, n_flips: int = 10_000) -> float:
    """Two-sided p of the mean of paired differences, by random sign flips."""
    signs = np.random.default_rng(seed).integers(0, 2, (n_flips, len(differences))) * 2 - 1
    means = np.abs((signs * differences).mean(axis=1))
    return float((1 + (means >= abs(differences.mean()) - 1e-12).sum()) / (1 + n_flips))


def sign_flip_p(differences: Tensor, seed: int = 0, n_flips: int = N_FLIPS) -> np.ndarray:
    """One-sided p [n] of differences d [n_pairs, n] under sign flips of whole pairs, at least 1 / (n_flips + 1).

    The statistic is sum(d) / sqrt(sum(d^2)).
    """
    scaled = differences / differences.square().sum(dim=0).sqrt().clamp_min(1e-300)
    observed = scaled.sum(dim=0)
    generator = torch.Generator().manual_seed(seed)
    exceeding = torch.zeros(len(observed))
    for first in range(0, n_flips, 2000):
        flips = torch.randint(0, 2, (min(2000, n_flips - first), len(scaled)), generator=generator).double() * 2 - 1
        exceeding += (flips @ scaled >= observed - 1e-9).sum(dim=0)
    return ((exceeding + 1) / (n_flips + 1)).numpy()


def holm(p: np.ndarray, rate: float) -> np.ndarray:
    """Which hypotheses [n] Holm's method rejects: the chance of any wrong rejection is at most `rate`."""
    order = np.argsort(p, kind="stable")
    passed = np.logical_and.accumulate(p[order] <= rate / (len(p) - np.arange(len(p))))
    return passed[np.argsort(order)]


def auc(positives: Tensor, negatives: Tensor, columns: int = 512) -> Tensor:
    """Area under the ROC curve, [n_positives, n_units] and [n_negatives, n_units] to [n_units]; ties count half."""
    result = torch.full((positives.shape[1],), 0.5, dtype=torch.float64)
    # Most sparse units are never active on a family's prompts: all ties.
    moving = ((positives != 0).any(dim=0) | (negatives != 0).any(dim=0)).nonzero()[:, 0]
    for units in moving.split(columns):
        ordered, wanted = negatives[:, units].T.sort(dim=1).values.contiguous(), positives[:, units].T.contiguous()
        below = torch.searchsorted(ordered, wanted, right=False) + torch.searchsorted(ordered, wanted, right=True)
        result[units] = below.double().mean(dim=1) / (2 * len(negatives))
    return result
