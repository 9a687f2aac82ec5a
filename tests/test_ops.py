"""The vectorised operations equal the reference loops, keep exactly K, break ties one way, and have exact gradients."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor
from toys import rotaries

from lorsa_utils import ops, reference
from lorsa_utils.config import RotaryConfig
from lorsa_utils.selection import SCORES, Selection

seeds = st.integers(0, 2**20)
sizes = st.integers(1, 6)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- attention


@given(batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 8), d_qk=sizes, d_v=sizes, seed=seeds)
def test_attention_equals_the_loops(batch: int, heads: int, length: int, d_qk: int, d_v: int, seed: int) -> None:
    q, k = draw(batch, heads, length, d_qk, seed=seed), draw(batch, heads, length, d_qk, seed=seed + 1)
    v = draw(batch, heads, length, d_v, seed=seed + 2)
    found = ops.causal_attention(q, k, v, 0.7)
    assert found.shape == (batch, heads, length, d_v)
    assert (found - ops.causal_attention(q, k, v, 0.7, backend="reference")).abs().max() < 1e-10
    assert (found - ops.attention_pattern(q, k, 0.7) @ v).abs().max() < 1e-10


@given(d_qk=st.integers(2, 9), length=st.integers(1, 9), seed=seeds, data=st.data())
def test_rotation_equals_the_loops(d_qk: int, length: int, seed: int, data: st.DataObject) -> None:
    rotary = data.draw(rotaries(d_qk))
    x = draw(2, length, d_qk, seed=seed)
    cos, sin = ops.rotary_tables(rotary, length, dtype=torch.float64)
    found = ops.apply_rotary(x, cos, sin, rotary.adjacent_pairs)
    for row, turned in zip(x, found, strict=True):
        expected = torch.stack([reference.rotate(vector, i, rotary) for i, vector in enumerate(row)])
        assert (turned - expected).abs().max() < 1e-10


def test_scores_of_rotated_vectors_depend_on_the_distance_alone() -> None:
    rotary = RotaryConfig(rope_type="llama3", rotary_dim=4, factor=8.0, original_context=16)
    cos, sin = ops.rotary_tables(rotary, 50, dtype=torch.float64)
    q, k = (ops.apply_rotary(draw(6, seed=seed).expand(50, 6), cos, sin, False) for seed in (0, 1))
    scores = q @ k.T
    assert torch.allclose(scores[7:, 7:], scores[:-7, :-7], atol=1e-12)
    assert scores[10, :10].std() > 1e-3


# ---- selection


def check_top_k(scores: Tensor, k: int, floor: float | None = None) -> None:
    before, floored = scores.clone(), scores if floor is None else scores.clamp_min(floor)
    found = ops.select_top_k(scores, k, floor=floor)
    assert found.dtype == torch.int64
    assert torch.equal(found.sort(dim=1).values, reference.select_top_k(floored, k))
    assert torch.equal(ops.select_top_k(scores, k, "reference", floor), reference.select_top_k(floored, k))
    assert torch.equal(scores, before)


@given(rows=st.integers(1, 5), n=st.integers(1, 6), seed=seeds, data=st.data())
def test_ties_go_to_the_lower_index(rows: int, n: int, seed: int, data: st.DataObject) -> None:
    scores = torch.randint(0, 4, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    check_top_k(scores, data.draw(st.integers(1, n)))


@pytest.mark.parametrize("floor", [None, 0.0])
@pytest.mark.parametrize(("n", "k"), [(400, 7), (800, 24), (400, 24), (401, 7)])
def test_wide_rows_are_searched_in_two_short_searches(n: int, k: int, floor: float | None) -> None:
    """Few different scores, so that ties cross the folds; 401 columns, and 400 for 24, are not folded."""
    check_top_k(torch.randint(-30, 30, (60, n), generator=torch.Generator().manual_seed(n + k)).float(), k, floor)


@pytest.mark.parametrize("k", [1, 2, 63, 64, 999, 1000])
def test_exactly_k_among_many_equal_scores(k: int) -> None:
    """As at the start of training: most scores are exactly zero."""
    check_top_k(torch.randint(-40, 4, (50, 1000), generator=torch.Generator().manual_seed(k)).clamp_min(0).float(), k)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", [3, 6])
def test_selection_among_some_units(score: str, k: int) -> None:
    """As AuxK's on a GPU; where they are fewer than k, others fill up."""
    among = torch.zeros(24, dtype=torch.bool)
    among[[2, 3, 11, 17]] = True
    indices = ops.select_heads(draw(9, 24), Selection(k, draw(24, seed=1).abs(), score), among, backend="torch")
    assert (among[indices].sum(dim=1) == min(k, 4)).all()


# ---- decode


def chosen(rows: int, n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(rows)])


@given(rows=sizes, n=sizes, d=sizes, seed=seeds, data=st.data())
def test_decode_equals_the_loops(rows: int, n: int, d: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    indices, values, weight = chosen(rows, n, k, seed), draw(rows, k, seed=seed), draw(n, d, seed=seed + 1)
    found = ops.sparse_decode(indices, values, weight)
    dense = torch.zeros(rows, n, dtype=torch.float64).scatter(1, indices, values) @ weight
    assert (found - ops.sparse_decode(indices, values, weight, backend="reference")).abs().max() < 1e-10
    assert (found - dense).abs().max() < 1e-10


@pytest.mark.parametrize(("rows", "n", "k", "d"), [(5, 7, 3, 4), (1, 1, 1, 1), (3, 4, 4, 2), (6, 30, 2, 3)])
@pytest.mark.parametrize("learning", ["values weight", "values", "weight"])
def test_gradients_of_decode(rows: int, n: int, k: int, d: int, learning: str) -> None:
    """Also when one side is frozen."""
    indices = chosen(rows, n, k)
    values = draw(rows, k).requires_grad_("values" in learning)
    weight = draw(n, d, seed=1).requires_grad_("weight" in learning)
    assert torch.autograd.gradcheck(lambda v, w: ops.sparse_decode(indices, v, w), (values, weight))


# ---- attention and selection as one


class Layer(NamedTuple):
    """Inputs of `sparse_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    norms: Tensor
    dead: Tensor


def layer(batch: int, groups: int, length: int, d_qk: int, size: int, seed: int = 0) -> Layer:
    q, k, v = (draw(batch, length, groups, width, seed=seed + i) for i, width in enumerate((d_qk, d_qk, size)))
    sides = [side.transpose(1, 2).requires_grad_() for side in (q, k, v)]
    dead = draw(groups * size, seed=seed + 4) < 0
    dead[0] = True
    return Layer(sides[0], sides[1], sides[2], draw(groups * size, seed=seed + 3).abs() + 0.1, dead)


def gradients(found: ops.KeptHeads, inputs: Layer) -> list[Tensor]:
    upstream = [draw(*side.shape, seed=9) for side in (found.values, found.aux_values)]
    total = (found.values * upstream[0]).sum() + (found.aux_values * upstream[1]).sum()
    return list(torch.autograd.grad(total, inputs[:3]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("shape", "n_keep", "aux_k"),
    [
        *[((1, 1, 1, 2, 1), 1, 0), ((2, 3, 7, 4, 2), 3, 2), ((1, 2, 150, 8, 8), 1, 3)],
        *[((2, 4, 97, 8, 3), 12, 0), ((2, 30, 11, 4, 6), 5, 40), ((2, 30, 3, 4, 2), 1, 0)],
    ],
)
def test_sparse_attention_equals_plain_autograd(shape: tuple[int, ...], n_keep: int, aux_k: int, score: str) -> None:
    """Also for more (sequence, group) pairs and queries than are handled at a time, and heads chosen twice."""
    inputs = layer(*shape)
    found = ops.sparse_attention(*inputs[:3], 0.6, Selection(n_keep, inputs.norms, score, inputs.dead, aux_k))
    z = (ops.attention_pattern(inputs.q, inputs.k, 0.6) @ inputs.v).transpose(1, 2).reshape(shape[0] * shape[2], -1)
    active = z.relu() if score == "relu" else z
    plain = ops.KeptHeads(
        found.indices, active.gather(1, found.indices), found.aux_indices, active.gather(1, found.aux_indices)
    )
    scores = active.abs() * inputs.norms
    assert torch.equal(found.indices.sort(dim=1).values, reference.select_top_k(scores.detach(), n_keep))
    assert found.aux_indices.shape[1] == min(aux_k, int(inputs.dead.sum()))
    assert inputs.dead[found.aux_indices].all()
    assert (found.values - plain.values).abs().max() < 1e-12
    mine, autograds = gradients(found, inputs), gradients(plain, inputs)
    assert all((one - other).abs().max() < 1e-11 for one, other in zip(mine, autograds, strict=True))
    assert mine[2].abs().max() > 0


def test_sparse_attention_by_the_loops() -> None:
    inputs = layer(1, 2, 6, 4, 3)
    selection = Selection(2, inputs.norms)
    results = [ops.sparse_attention(*inputs[:3], 0.6, selection, backend) for backend in ("torch", "reference")]
    assert torch.equal(results[0].indices.sort(dim=1).values, results[1].indices.sort(dim=1).values)
    sides = (gradients(found._replace(values=found.values.sort(dim=1).values), inputs) for found in results)
    assert all((one - other).abs().max() < 1e-12 for one, other in zip(*sides, strict=True))


def test_memory_of_the_backward_pass_holds_no_dense_activations() -> None:
    """What is kept for the backward pass: inputs, log-sum-exp, and K numbers and indices a token."""
    inputs = layer(2, 4, 50, 8, 16)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda nothing: nothing):
        ops.sparse_attention(*inputs[:3], 0.6, Selection(3, inputs.norms))
    tokens = 2 * 50
    assert sum(saved) == sum(side.numel() for side in inputs[:3]) + tokens * (4 + 3 + 3)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_sparse_encode(score: str) -> None:
    x, weight, bias = (draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(7, 5), (12, 5), (12,)]))
    selection = Selection(4, draw(12, seed=3).abs() + 0.1, score, torch.arange(12) % 3 == 0, 2)

    def encode(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        kept = ops.sparse_encode(*inputs, selection)
        return kept.values, kept.aux_values

    assert torch.autograd.gradcheck(encode, (x, weight, bias))
    kept = ops.sparse_encode(x, weight, bias, selection)
    dense = x @ weight.T + bias
    assert torch.allclose(kept.values, (dense.relu() if score == "relu" else dense).gather(1, kept.indices))


def test_unknown_backend_is_refused() -> None:
    with refused("no backend 'cuda'; choose one of auto, torch, triton, reference"):
        ops.sparse_decode(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.ones(2, 3), backend="cuda")
    assert ops.choose_backend("auto", torch.ones(1)) == "torch"
