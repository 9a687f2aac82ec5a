"""The loops agree with a second form of the equations: dense matrices, complex rotations, masks for the top K."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import lorsa_configs, random_inputs, randomized, rotaries

from lorsa_utils import reference
from lorsa_utils.config import LorsaConfig, RotaryConfig
from lorsa_utils.lorsa import Lorsa

seeds = st.integers(0, 2**20)


def frequencies_by_wavelength(rotary: RotaryConfig) -> list[float]:
    """Angles per token in the three-branch form: by wavelength, as Llama 3.1 describes its scaling."""
    result = []
    for pair in range(rotary.rotary_dim // 2):
        plain = 1 / rotary.theta ** (pair / (rotary.rotary_dim / 2))
        wavelength = 2 * math.pi / plain
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        turns = rotary.original_context / wavelength
        if rotary.rope_type == "default" or (rotary.rope_type == "llama3" and turns > high):
            result.append(plain)
        elif rotary.rope_type == "linear" or turns < low:
            result.append(plain / rotary.factor)
        else:
            smooth = (turns - low) / (high - low)
            result.append((1 - smooth) * plain / rotary.factor + smooth * plain)
    return result


def rotate_complex(rows: Tensor, rotary: RotaryConfig) -> Tensor:
    """Rows [length, d_qk] turned by position, each pair as one complex number."""
    if rotary.rope_type == "none":
        return rows
    half = rotary.rotary_dim // 2
    turned = rows[:, : 2 * half]
    pairs = turned.unflatten(1, (half, 2)) if rotary.adjacent_pairs else turned.unflatten(1, (2, half)).transpose(1, 2)
    angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * torch.tensor(
        reference.inverse_frequencies(rotary), dtype=torch.float64
    )
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    flat = spun.flatten(1) if rotary.adjacent_pairs else spun.transpose(1, 2).flatten(1)
    return torch.cat([flat, rows[:, 2 * half :]], dim=1)


def dense_lorsa(x: Tensor, w: dict[str, Tensor], config: LorsaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and the mask of kept heads [length, n_ov], with one softmax matrix for each group."""
    length = len(x)
    z = torch.empty(length, config.n_ov_heads, dtype=x.dtype)
    for group in range(config.n_qk_heads):
        q, k = (x @ w[f"W_{side}"][group] + w[f"b_{side}"][group] for side in "QK")
        if config.qk_norm:
            q, k = (
                side * (side.pow(2).mean(1, keepdim=True) + config.qk_norm_eps) ** -0.5 * w[name][group]
                for side, name in ((q, "q_norm"), (k, "k_norm"))
            )
        q, k = rotate_complex(q, config.rotary), rotate_complex(k, config.rotary)
        scale = config.attn_scale or 1 / math.sqrt(config.d_qk)
        weights = torch.exp(scale * q @ k.T).tril()
        pattern = weights / weights.sum(1, keepdim=True)
        heads = slice(group * config.group_size, (group + 1) * config.group_size)
        z[:, heads] = pattern @ (x @ w["W_V"][heads].T + w["b_V"][heads])
    kept_z = z.relu() if config.score == "relu" else z
    scores = kept_z.abs() * w["W_O"].pow(2).sum(1).sqrt()
    ranks = scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    kept = ranks < config.k
    return (kept_z * kept) @ w["W_O"] + w["b_O"], z, kept


@settings(max_examples=40)
@given(config=lorsa_configs(), length=st.integers(1, 6), seed=seeds)
def test_loops_equal_dense_matrices(config: LorsaConfig, length: int, seed: int) -> None:
    weights = dict(randomized(Lorsa(config), seed).state_dict())
    x = random_inputs(1, length, config.d_model, seed + 1, torch.float64)[0]
    y, z, indices = reference.lorsa_forward(x, weights, config)
    expected_y, expected_z, kept = dense_lorsa(x, weights, config)
    assert (z - expected_z).abs().max() < 1e-10
    assert (y - expected_y).abs().max() < 1e-10
    assert torch.equal(torch.zeros_like(kept).scatter(1, indices, torch.ones_like(indices, dtype=torch.bool)), kept)


@given(rotary=rotaries(16).filter(lambda rotary: rotary.rope_type != "none"))
def test_frequencies_equal_the_wavelength_form(rotary: RotaryConfig) -> None:
    found = torch.tensor(reference.inverse_frequencies(rotary), dtype=torch.float64)
    expected = torch.tensor(frequencies_by_wavelength(rotary), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-7, atol=0)  # models hold them in float32


def test_llama3_scaling_has_all_three_branches() -> None:
    rotary = RotaryConfig(rope_type="llama3", rotary_dim=16, theta=10000.0, factor=8.0, original_context=64)
    plain = torch.tensor(reference.inverse_frequencies(rotary.replace(rope_type="default")))
    ratios = plain / torch.tensor(reference.inverse_frequencies(rotary))
    assert ratios[0] == 1
    assert ratios[-1] == 8
    assert ((ratios > 1.01) & (ratios < 7.99)).any()


def test_attention_by_hand() -> None:
    """Two tokens, scores 0 and ln 3: the second token attends with 1/4 and 3/4. Large scores do not overflow."""
    q, k, v = (
        torch.tensor([[first], [second]]).double() for first, second in ((1.0, 1.0), (0.0, math.log(3)), (4.0, 8.0))
    )
    assert reference.causal_attention(q, k, v, 1.0).flatten().tolist() == pytest.approx([4.0, 7.0])
    assert torch.isfinite(reference.causal_attention(1e4 * q, 1e4 * q, v, 1.0)).all()


def test_rotation_by_hand() -> None:
    """One radian per token, dimension 0 with 1 in adjacent pairs, 0 with 2 in halves; the rest pass or barely turn."""
    rotary = RotaryConfig(rope_type="default", rotary_dim=2, theta=10000.0, adjacent_pairs=True)
    cos, sin = math.cos(3), math.sin(3)
    vector = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    assert reference.rotate(vector, 3, rotary).tolist() == pytest.approx([cos - 2 * sin, 2 * cos + sin, 5.0, 7.0])
    halves = RotaryConfig(rope_type="default", rotary_dim=4, theta=1e30)
    turned = [cos - 5 * sin, 2.0, 5 * cos + sin, 7.0]
    assert reference.rotate(vector, 3, halves).tolist() == pytest.approx(turned, abs=1e-12)


def test_top_k_and_decode_by_hand() -> None:
    indices = reference.select_top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert indices.tolist() == [[1, 2], [0, 1]]
    assert reference.select_top_k(torch.tensor([[5.0, 5.0, 5.0, 6.0]]), 2).tolist() == [[0, 3]]
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    decoded = reference.sparse_decode(torch.tensor([[0, 2]]), torch.tensor([[3.0, -1.0]]), weight)
    assert decoded.tolist() == [[1.0, -2.0]]
