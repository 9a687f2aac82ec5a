"""Where each model family keeps its modules, and its attention weights by head.

To add a family, add an entry to `ARCHITECTURES` and a tiny model to `tests/tiny_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError

Projection = tuple[Tensor, Tensor | None]
"""Weight [width of the output, width of the input] and bias."""


@dataclass(frozen=True)
class Architecture:
    """Dotted paths of modules: `blocks` and `final_norm` in the model, the others in a block."""

    blocks: str
    final_norm: str
    attention: str
    norms: tuple[str, ...]
    """All of a block; the first comes before the attention."""
    activation: str
    """Of the MLP."""
    gated: bool
    """Whether a frozen pass holds fixed the activation's output (a factor on another projection), or else the ratio of
    its output to its input."""
    projections: Callable[[Any, Any], Iterable[Projection]]
    """(config, attention module) to those of queries, keys, values and output."""
    fixed: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(repr=False)
    """Modules that compute queries and keys, to (config, output) -> output with these detached, but not values."""
    mlp: str = "mlp"
    has_rotary: bool = True

    def weights(self, config: Any, attention: Any) -> dict[str, Any]:
        """Those of an `AttentionSite`."""
        *projections, (out, b_O) = self.projections(config, attention)
        n_heads = config.num_attention_heads
        n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
        weights: dict[str, Any] = {"W_O": out.T.unflatten(0, (n_heads, -1)), "b_O": _or_zeros(b_O, out)}
        for letter, n, (weight, bias) in zip("QKV", (n_heads, n_kv_heads, n_kv_heads), projections, strict=True):
            weights[f"W_{letter}"] = weight.unflatten(0, (n, -1)).transpose(1, 2)
            weights[f"b_{letter}"] = _or_zeros(bias, weight).unflatten(0, (n, -1))
        scale = weights["W_Q"].shape[-1] ** -0.5 if getattr(config, "scale_attn_weights", True) else 1.0
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            scale /= attention.layer_idx + 1
        if hasattr(attention, "q_norm"):
            weights |= {"q_norm_weight": attention.q_norm.weight, "k_norm_weight": attention.k_norm.weight}
            weights["qk_norm_eps"] = float(attention.q_norm.variance_epsilon)
        return weights | {"attn_scale": scale}


def of(model_type: str | None) -> Architecture:
    """The entry of a Hugging Face `model_type`, else UserError."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"Architecture {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def _gpt_neox_projections(config: Any, attention: Any) -> list[Projection]:
    """Fused: for each head in turn its query, key and value rows."""
    fused, dense = attention.query_key_value, attention.dense

    def rows(tensor: Tensor) -> list[Tensor]:
        return [side.flatten(0, 1) for side in tensor.unflatten(0, (config.num_attention_heads, 3, -1)).unbind(1)]

    biases = rows(_or_zeros(fused.bias, fused.weight))
    return [*zip(rows(fused.weight), biases, strict=True), (dense.weight, dense.bias)]


def _gpt_neox_fixed(config: Any, fused: Tensor) -> Tensor:
    by_head = fused.unflatten(-1, (config.num_attention_heads, 3, -1))
    return torch.cat([by_head[..., :2, :].detach(), by_head[..., 2:, :]], dim=-2).flatten(-3)


def _gpt2_projections(config: Any, attention: Any) -> list[Projection]:
    """Fused and transposed, [d_model, 3 d_model]: all queries, then all keys, then all values."""
    fused, out = attention.c_attn, attention.c_proj
    return [*zip(fused.weight.T.chunk(3), fused.bias.chunk(3), strict=True), (out.weight.T, out.bias)]


def _gpt2_fixed(config: Any, fused: Tensor) -> Tensor:
    query, key, value = fused.chunk(3, dim=-1)
    return torch.cat([query.detach(), key.detach(), value], dim=-1)


def _llama_projections(config: Any, attention: Any) -> list[Projection]:
    linears = [getattr(attention, f"{letter}_proj") for letter in "qkvo"]
    return [(linear.weight, linear.bias) for linear in linears]


def _detached(config: Any, projection: Tensor) -> Tensor:
    return projection.detach()


_LLAMA = Architecture(
    blocks="model.layers",
    final_norm="model.norm",
    attention="self_attn",
    norms=("input_layernorm", "post_attention_layernorm"),
    activation="mlp.act_fn",
    gated=True,
    projections=_llama_projections,
    fixed={"self_attn.q_proj": _detached, "self_attn.k_proj": _detached},
)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        norms=("ln_1", "ln_2"),
        activation="mlp.act",
        gated=False,
        projections=_gpt2_projections,
        fixed={"attn.c_attn": _gpt2_fixed},
        has_rotary=False,
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        norms=("input_layernorm", "post_attention_layernorm"),
        activation="mlp.act",
        gated=False,
        projections=_gpt_neox_projections,
        fixed={"attention.query_key_value": _gpt_neox_fixed},
    ),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
}
"""By `model_type` of the Hugging Face config."""
