"""The few operations that everything is made of: rotary tables, ONE attention, ONE top-K selection, ONE sparse decode.

Each takes `backend`: "torch" (vectorised, any device) or "reference" (the loops of `reference`, for checks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorsa_utils import reference
from lorsa_utils.config import RotaryConfig

BACKENDS = ("torch", "reference")


def rotary_tables(
    rotary: RotaryConfig, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of every position, each [length, rotary_dim / 2]; angles are computed in float64."""
    frequencies = torch.tensor(reference.inverse_frequencies(rotary), dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: [..., length, d_qk]; dimensions past rotary_dim are passed through (partial RoPE).
        cos, sin: [length, rotary_dim / 2] from `rotary_tables`.
        adjacent_pairs: which dimensions turn together, see `RotaryConfig`.
    """
    half = cos.shape[-1]
    if half == 0:
        return x
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if adjacent_pairs:
        first, second = turned[..., 0::2], turned[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, as in Qwen3's QK norm."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "torch") -> Tensor:
    """Causal softmax attention.

    Args:
        q, k: [batch, n_heads, length, d_qk], rotated.
        v: [batch, n_heads, length, d_v].
        scale: factor on q . k.

    Returns:
        [batch, n_heads, length, d_v].
    """
    if backend == "reference":
        flat = [reference.causal_attention(q[b, h], k[b, h], v[b, h], scale) for b in range(q.shape[0]) for h in range(q.shape[1])]
        return torch.stack(flat).reshape(v.shape)
    d_v, d_qk = v.shape[-1], q.shape[-1]
    if v.device.type == "cpu" and d_v < d_qk:
        # The CPU's fast path wants values as wide as keys.
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, d_qk - d_v)), is_causal=True, scale=scale)[..., :d_v]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def attention_pattern(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The pattern itself, q, k [..., length, d_qk] to [..., length, length]: rows are queries and sum to 1."""
    scores = (q @ k.transpose(-1, -2)) * scale
    length = q.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


def select_top_k(scores: Tensor, k: int, backend: str = "torch") -> Tensor:
    """Indices [n_rows, k] of the k largest scores [n_rows, n] of each row, exactly k, in no order; ties go to the lower index."""
    if backend == "reference":
        return reference.select_top_k(scores, k)
    n = scores.shape[-1]
    if k == n:
        return torch.arange(n, device=scores.device).expand(scores.shape[0], n)
    # One more than asked shows whether the choice at the boundary is a tie; only such rows need a stable sort.
    values, indices = scores.topk(k + 1, dim=-1, sorted=False)
    smallest, place = values.topk(2, dim=-1, largest=False)
    last = torch.full_like(place[:, :1], k)
    indices.scatter_(1, place[:, :1], indices.gather(1, last))
    tied = (smallest[:, 0] == smallest[:, 1]).nonzero()[:, 0]
    if tied.numel():
        indices[tied, :k] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices[:, :k].contiguous()


class _DecodeWeightGradient(torch.autograd.Function):
    """Passes y = decode(indices, values, weight) through and adds the gradient of `weight`, which touches the chosen rows alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values)
        ctx.n_units = weight.shape[0]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        grad = grad_outputs[0].contiguous()
        if not ctx.needs_input_grad[3]:
            return grad, None, None, None
        indices, values = ctx.saved_tensors
        # The decode's transpose is a bag too: row h sums the gradients of the tokens that chose it.
        heads, order = indices.flatten().sort(stable=True)
        offsets = torch.searchsorted(heads, torch.arange(ctx.n_units, device=heads.device))
        weights = values.flatten()[order].to(grad.dtype)
        grad_weight = F.embedding_bag(order // indices.shape[1], grad, offsets, per_sample_weights=weights, mode="sum")
        return grad, None, None, grad_weight


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, backend: str = "torch") -> Tensor:
    """Sum of chosen rows: indices [n_rows, k], values [n_rows, k], weight [n, d] to [n_rows, d]; differentiable in values and weight.

    Indices of one row must differ from each other.
    """
    if backend == "reference":
        return reference.sparse_decode(indices, values, weight)
    # The bag's own gradient of the values is fast, that of the weight is not: it comes from the function above.
    y = F.embedding_bag(indices, weight.detach(), per_sample_weights=values.to(weight.dtype), mode="sum")
    result: Tensor = _DecodeWeightGradient.apply(y, indices, values.detach(), weight)
    return result
