"""Nulls and corrections by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorsa_utils import stats

rows = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=8)


@given(rows, rows)
def test_auc_is_the_chance_of_a_larger_value(high: list[list[int]], low: list[list[int]]) -> None:
    labelled, controls = torch.tensor(high).float(), torch.tensor(low).float()
    larger = (labelled[:, None] > controls).double() + 0.5 * (labelled[:, None] == controls).double()
    assert torch.allclose(stats.auc(labelled, controls, columns=2), larger.mean(dim=(0, 1)))


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
