"""The paper's equations in plain loops over positions and heads: slow, short, and what the rest is checked against.

For a sequence X [length, d_model] and head h of QK group g (paper, Sec. 3):

    q_i, k_i = RoPE(norm(x_i W_Q^g + b_Q^g)), RoPE(norm(x_i W_K^g + b_K^g))
    A_ij     = softmax over j <= i of attn_scale * q_i . k_j
    v_i      = x_i . w_v^h + b_V^h                                (a scalar)
    z_i      = sum_j A_ij v_j
    y_i      = sum over the K heads with the largest score at i (see `selection`) of z_i w_o^h, plus b_O
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorsa_utils.config import LorsaConfig, RotaryConfig
from lorsa_utils.selection import Selection


def inverse_frequencies(rotary: RotaryConfig) -> list[float]:
    """Angle per token of each rotated pair, in radians (`llama3` scaling as in Llama 3.1)."""
    result = []
    for pair in range(rotary.rotary_dim // 2):
        frequency = rotary.theta ** (-2 * pair / rotary.rotary_dim)
        if rotary.rope_type == "linear":
            frequency /= rotary.factor
        if rotary.rope_type == "llama3":
            # Blend linearly, in units of turns within the original context, between "stretched" and "left alone".
            turns = rotary.original_context * frequency / (2 * math.pi)
            blend = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
            blend = min(1.0, max(0.0, blend))
            frequency = blend * frequency + (1 - blend) * frequency / rotary.factor
        # Models hold their frequencies in float32: rounding likewise keeps patterns equal far out in a long context.
        result.append(float(torch.tensor(frequency, dtype=torch.float32)))
    return result


def rotate(vector: Tensor, position: int, rotary: RotaryConfig) -> Tensor:
    """Rotate one query or key [d_qk] by its position."""
    result = vector.clone()
    half = rotary.rotary_dim // 2
    for pair, frequency in enumerate(inverse_frequencies(rotary)):
        first, second = (2 * pair, 2 * pair + 1) if rotary.adjacent_pairs else (pair, pair + half)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        result[first] = vector[first] * cos - vector[second] * sin
        result[second] = vector[second] * cos + vector[first] * sin
    return result


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one head: q, k [length, d_qk], v [length, d_v] to z [length, d_v]."""
    rows = []
    for i in range(q.shape[0]):
        scores = torch.stack([scale * (q[i] @ k[j]) for j in range(i + 1)])
        pattern = torch.exp(scores - scores.max())
        pattern = pattern / pattern.sum()
        rows.append(sum((pattern[j] * v[j] for j in range(i + 1)), torch.zeros_like(v[0])))
    return torch.stack(rows)


def select_top_k(scores: Tensor, k: int) -> Tensor:
    """As `ops.select_top_k`, with ascending indices."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        rows.append(sorted(order[:k]))
    return torch.tensor(rows, device=scores.device)


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """As `ops.sparse_decode`."""
    rows = []
    for index_row, value_row in zip(indices.tolist(), values, strict=True):
        chosen = (value * weight[index] for index, value in zip(index_row, value_row, strict=True))
        rows.append(sum(chosen, torch.zeros_like(weight[0])))
    return torch.stack(rows)


def lorsa_forward(x: Tensor, weights: Mapping[str, Tensor], config: LorsaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """y [length, d_model], z [length, n_ov] and kept heads [length, k] of x [length, d_model].

    Weights have the names and shapes of `lorsa.Lorsa`.
    """
    scale = config.attn_scale or config.d_qk**-0.5
    columns = []
    for head in range(config.n_ov_heads):
        group = head // config.group_size
        sides = []
        for side in ("Q", "K"):
            rows = []
            for i, token in enumerate(x):
                row = token @ weights[f"W_{side}"][group] + weights[f"b_{side}"][group]
                if config.qk_norm:
                    size = torch.sqrt((row * row).mean() + config.qk_norm_eps)
                    row = row / size * weights[f"{side.lower()}_norm"][group]
                rows.append(rotate(row, i, config.rotary))
            sides.append(torch.stack(rows))
        v = torch.stack([token @ weights["W_V"][head] + weights["b_V"][head] for token in x])[:, None]
        columns.append(causal_attention(sides[0], sides[1], v, scale)[:, 0])
    z = torch.stack(columns, dim=1)
    norms = torch.stack([row.norm() for row in weights["W_O"]])
    selection = Selection(config.k, norms, config.score)
    indices = select_top_k(selection.scores(z).clamp_min(0), config.k)
    written = selection.activations(z)
    values = torch.stack([torch.stack([written[i, head] for head in row]) for i, row in enumerate(indices.tolist())])
    return sparse_decode(indices, values, weights["W_O"]) + weights["b_O"], z, indices
