"""SAE and transcoder: the equations by hand, gradients, folding. Saving and loading is tested with Lorsa's."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import random_inputs, random_lorsa, random_sae, randomized

from lorsa_utils.config import SAEConfig
from lorsa_utils.lorsa import SAE, Scaling


@given(d=st.integers(1, 6), n=st.integers(1, 9), seed=st.integers(0, 2**20), data=st.data())
def test_equals_plain_loops(d: int, n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    module = randomized(SAE(SAEConfig(d_model=d, n_features=n, k=k)), seed).requires_grad_(False)
    x = random_inputs(2, 3, d, seed + 1, torch.float64)
    output = module(x)
    for b in range(2):
        for i in range(3):
            f = [max(0.0, float(module.W_E[j] @ x[b, i] + module.b_E[j])) for j in range(n)]
            scores = [f[j] * float(module.W_O[j].norm()) for j in range(n)]
            kept = sorted(sorted(range(n), key=lambda j: (-scores[j], j))[:k])
            y = sum((f[j] * module.W_O[j] for j in kept), module.b_O.clone())
            assert sorted(output.indices[b, i].tolist()) == kept
            assert (output.y[b, i] - y).abs().max() < 1e-10


def test_by_hand() -> None:
    """Two features along the axes, the second written at double length: at k = 1 the score decides, not the activation."""
    module = SAE(SAEConfig(d_model=2, n_features=2, k=1))
    with torch.no_grad():
        module.W_E.copy_(torch.eye(2))
        module.b_E.copy_(torch.tensor([0.0, -1.0]))
        module.W_O.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        module.b_O.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[[3.0, 3.0], [3.0, 2.0], [-1.0, -1.0]]])
    output = module(x)
    assert module.pre_activations(x).tolist() == [[[3.0, 2.0], [3.0, 1.0], [-1.0, -2.0]]]
    assert output.indices[0].tolist() == [[1], [0], [0]]
    assert output.values[0].tolist() == [[2.0], [3.0], [0.0]]
    assert output.y[0].tolist() == [[0.5, 4.0], [3.5, 0.0], [0.5, 0.0]]


def test_gradients() -> None:
    for seed in range(100):
        module = random_sae(seed, torch.float64, d_model=4, n_features=6, k=2)
        x = random_inputs(1, 3, 4, seed, torch.float64)
        pre = module.pre_activations(x)
        scores = (pre.relu() * module.W_O.norm(dim=1)).sort(dim=-1).values
        if (pre.abs() > 1e-3).all() and (scores[..., -2] - scores[..., -3] > 1e-3).all():
            break
    names = [name for name, _ in module.named_parameters()]
    tensors = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)).y
        return result

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *tensors))


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_folding_keeps_outputs(kind: Literal["sae", "transcoder"]) -> None:
    module, x = random_sae(dtype=torch.float64, kind=kind), random_inputs(2, 5, dtype=torch.float64)
    scaling = Scaling(torch.randn(x.shape[-1], dtype=torch.float64), 0.3, 7.0)
    trained = module(scaling.inputs(x)).y / 7.0
    module.fold(scaling)
    module.fold_norms()
    assert torch.allclose(module(x).y, trained, atol=1e-10)
    assert torch.allclose(module.W_O.norm(dim=1), torch.ones(24, dtype=torch.float64), atol=1e-12)


def test_the_sae_reads_the_output_and_the_others_the_input() -> None:
    read, written = torch.zeros(1), torch.ones(1)
    assert random_sae(kind="sae").input_from(read, written) is written
    assert random_sae(kind="transcoder").input_from(read, written) is read
    assert random_lorsa().input_from(read, written) is read
