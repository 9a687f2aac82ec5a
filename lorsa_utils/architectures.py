"""Where each model family keeps its modules, and its attention weights by head.

To add a family, add an entry to `ARCHITECTURES` and a tiny model to `tests/tiny_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError


@dataclass(frozen=True)
class Architecture:
    """Dotted paths of modules: `blocks` and `final_norm` in the model, the others in a block."""

    blocks: str
    final_norm: str
    attention: str
    norms: tuple[str, ...]
    """All of a block; the first comes before the attention."""
    mlp: str
    activation: str
    """Of the MLP."""
    gated: bool
    """Whether a frozen pass holds fixed the activation's output (a factor on another projection), or else the ratio of
    its output to its input."""
    heads: Callable[[Any, Any], dict[str, Any]]
    """(config, attention module) to the weights of an `AttentionSite`."""
    fixed: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(repr=False)
    """Modules that compute queries and keys, to (config, output) -> output with these detached, but not values."""
    has_rotary: bool = True


def of(model_type: str | None) -> Architecture:
    """The entry of a Hugging Face `model_type`, else UserError."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"Architecture {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


def _in_heads(projection: Tensor, n_heads: int) -> Tensor:
    """[n_heads * d_head, d_model] to [n_heads, d_model, d_head]."""
    return projection.unflatten(0, (n_heads, -1)).transpose(1, 2)


def _bias(linear: Any) -> Tensor:
    return linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias


def _gpt_neox_heads(config: Any, attention: Any) -> dict[str, Any]:
    """A fused projection: for each head in turn its query, key and value rows."""
    n_heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    fused, dense = attention.query_key_value, attention.dense
    W_Q, W_K, W_V = fused.weight.unflatten(0, (n_heads, 3, d_head)).transpose(2, 3).unbind(1)
    b_Q, b_K, b_V = _bias(fused).unflatten(0, (n_heads, 3, d_head)).unbind(1)
    W_O = dense.weight.T.unflatten(0, (n_heads, d_head))
    weights = {"W_Q": W_Q, "W_K": W_K, "W_V": W_V, "W_O": W_O, "b_Q": b_Q, "b_K": b_K, "b_V": b_V, "b_O": _bias(dense)}
    return weights | {"attn_scale": d_head**-0.5}


def _gpt_neox_fixed(config: Any, fused: Tensor) -> Tensor:
    by_head = fused.unflatten(-1, (config.num_attention_heads, 3, -1))
    return torch.cat([by_head[..., :2, :].detach(), by_head[..., 2:, :]], dim=-2).flatten(-3)


def _gpt2_heads(config: Any, attention: Any) -> dict[str, Any]:
    """A fused projection [d_model, 3 d_model]: all queries, then all keys, then all values."""
    n_heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    fused, projection = attention.c_attn, attention.c_proj
    W_Q, W_K, W_V = (_in_heads(weight.T, n_heads) for weight in fused.weight.chunk(3, dim=1))
    b_Q, b_K, b_V = fused.bias.unflatten(0, (3, n_heads, d_head)).unbind(0)
    W_O, b_O = projection.weight.unflatten(0, (n_heads, d_head)), projection.bias
    scale = d_head**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= attention.layer_idx + 1
    weights = {"W_Q": W_Q, "W_K": W_K, "W_V": W_V, "W_O": W_O, "b_Q": b_Q, "b_K": b_K, "b_V": b_V, "b_O": b_O}
    return weights | {"attn_scale": scale}


def _gpt2_fixed(config: Any, fused: Tensor) -> Tensor:
    query, key, value = fused.chunk(3, dim=-1)
    return torch.cat([query.detach(), key.detach(), value], dim=-1)


def _llama_heads(config: Any, attention: Any) -> dict[str, Any]:
    """Separate projections, with GQA."""
    weights: dict[str, Any] = {}
    n_heads = config.num_attention_heads
    n_kv_heads = config.num_key_value_heads or n_heads
    for letter, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
        linear = getattr(attention, f"{letter}_proj")
        weights[f"W_{letter.upper()}"] = _in_heads(linear.weight, heads)
        weights[f"b_{letter.upper()}"] = _bias(linear).unflatten(0, (heads, -1))
    weights["W_O"] = attention.o_proj.weight.T.unflatten(0, (n_heads, -1))
    weights["b_O"] = _bias(attention.o_proj)
    return weights | {"attn_scale": weights["W_Q"].shape[-1] ** -0.5}


def _qwen3_heads(config: Any, attention: Any) -> dict[str, Any]:
    """Llama's, with an RMSNorm over each query and key."""
    norms = {"q_norm_weight": attention.q_norm.weight, "k_norm_weight": attention.k_norm.weight}
    return _llama_heads(config, attention) | norms | {"qk_norm_eps": float(attention.q_norm.variance_epsilon)}


def _detached(config: Any, projection: Tensor) -> Tensor:
    return projection.detach()


_LLAMA = Architecture(
    blocks="model.layers",
    final_norm="model.norm",
    attention="self_attn",
    norms=("input_layernorm", "post_attention_layernorm"),
    mlp="mlp",
    activation="mlp.act_fn",
    gated=True,
    heads=_llama_heads,
    fixed={"self_attn.q_proj": _detached, "self_attn.k_proj": _detached},
)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        norms=("ln_1", "ln_2"),
        mlp="mlp",
        activation="mlp.act",
        gated=False,
        heads=_gpt2_heads,
        fixed={"attn.c_attn": _gpt2_fixed},
        has_rotary=False,
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        norms=("input_layernorm", "post_attention_layernorm"),
        mlp="mlp",
        activation="mlp.act",
        gated=False,
        heads=_gpt_neox_heads,
        fixed={"attention.query_key_value": _gpt_neox_fixed},
    ),
    "llama": _LLAMA,
    "qwen3": replace(_LLAMA, heads=_qwen3_heads),
}
"""By `model_type` of the Hugging Face config."""
