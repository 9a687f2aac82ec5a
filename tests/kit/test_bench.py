"""Counts by hand, a backend that errs is not timed, rows are appended whole.

No test looks at how long anything took.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import bench
from lorsa_utils.kit.bench import Shape
from lorsa_utils.lorsa import Lorsa

CPU = torch.device("cpu")
PEAK_MB = bench.peak_mb
TINY = Shape(d_model=16, n_qk=3, d_qk=8, n_heads=12, k=4, batch=2, length=5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench, "peak_mb", lambda *arguments: 1.0)  # a process of its own, for each row


@pytest.mark.slow
def test_peak_memory_is_that_of_weights_and_more() -> None:
    peak = PEAK_MB("torch", "A", CPU)
    assert math.isnan(peak) or peak > 16 * bench.SHAPES["A"].config().n_parameters / 1e6


def test_the_papers_layer_costs_what_the_paper_says() -> None:
    """18.0 Mi weights; 66 MFLOP a token when about half of the (query, QK group) pairs are visited."""
    shape = bench.SHAPES["pythia"]
    assert shape.config().n_parameters == 18 * 2**20
    pairs = shape.batch * shape.n_qk * shape.length * (shape.length + 1) // 2
    assert bench.count_flops(shape, pairs // 2) / shape.n_tokens == pytest.approx(64e6, rel=0.03)
    assert bench.count_bytes(shape) == 36 * 18 * 2**20


def test_flops_by_hand() -> None:
    projections = 4 * 10 * 16 * (2 * 3 * 8 + 12)  # 10 tokens, forward and the weights' gradient
    causal = 2 * 3 * 15  # 2 sequences, 3 groups, 15 query-key pairs
    attention = 2 * (8 + 4) * causal + 2 * (3 * 8 + 2 * 4) * 7
    assert bench.count_flops(TINY, 7) == projections + attention + 3 * 2 * 10 * 4 * 16


def test_visited_pairs_by_hand() -> None:
    indices = torch.zeros(2, 5, 4, dtype=torch.long)  # heads 0..3 are group 0, 4..7 group 1, 8..11 group 2
    indices[1, 4] = torch.tensor([0, 1, 4, 11])
    share, pairs = bench.visited_pairs(indices, TINY)
    assert share == pytest.approx((10 + 2) / 30)
    assert pairs == 2 * 15 + 2 * 5


@pytest.mark.parametrize("name", ["torch", "plain"])
def test_backends_agree_with_float64(name: str) -> None:
    bench.check(name, TINY, CPU)


def wrong(module: Lorsa, x: Tensor) -> Tensor:
    return 1.001 * bench.ours(module, x)


def forgetful(module: Lorsa, x: Tensor) -> Tensor:
    """Gives no gradient to the output bias."""
    return bench.plain(module, x) - module.b_O + module.b_O.detach()


@pytest.mark.parametrize(
    ("mine", "words"), [(wrong, r"is off by .*it is not timed"), (forgetful, "off by|no gradient")]
)
def test_a_backend_that_errs_is_not_timed(monkeypatch: pytest.MonkeyPatch, mine: bench.Forward, words: str) -> None:
    known = bench.backends(CPU)
    monkeypatch.setattr(bench, "backends", lambda device: {**known, "mine": mine})
    with pytest.raises(UserError, match=words):
        bench.measure("tiny", CPU, ["mine"], rounds=1)


def test_rows_of_a_run(tmp_path: Path, answer: Any) -> None:
    file = tmp_path / "benchmarks.csv"
    for _ in range(2):
        told = answer("bench", "--shape", "tiny", "--backend", "torch,plain", "--rounds", "2", "--out", file)["rows"]
    rows = pd.read_csv(file)
    assert list(rows.backend) == ["torch", "plain"] * 2
    assert [row["backend"] for row in told] == ["torch", "plain"]
    asked = {"device", "step_ms_p20", "step_ms_p50", "step_ms_p80", "step_over_floor", "tokens_per_s", "peak_mb"}
    assert asked <= set(rows.columns) == set(told[0])
    assert (rows.step_ms_p20 <= rows.step_ms_p50).all()
    assert (rows.step_ms_p50 <= rows.step_ms_p80).all()
    assert rows.tokens_per_s.to_numpy() == pytest.approx(1e3 * TINY.n_tokens / rows.step_ms_p50.to_numpy(), rel=1e-3)
    assert rows.step_over_floor.to_numpy() == pytest.approx((rows.step_ms_p50 / rows.floor_ms).to_numpy(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "Z"], "no shape 'Z'; choose one of A, B"),
        (["--shape", "tiny", "--backend", "cuda"], "no backend 'cuda' on cpu; choose from torch, plain"),
    ],
)
def test_unknown_names_are_refused(options: list[str], words: str, tmp_path: Path, complaint: Any) -> None:
    assert words in complaint("bench", *options, "--device", "cpu", "--out", tmp_path / "b.csv")
