"""What training the Lorsa layers of a preset costs, by arithmetic: operations over a rate, and bytes.

A step's operations are those that no correct step avoids (`bench.count_flops`), with the share of queries that the
attention's backward pass visits taken for heads that are kept at random. Every other number follows from the preset
alone.
"""

from __future__ import annotations

from typing import Any

from lorsa_utils.config import LorsaConfig, Preset
from lorsa_utils.kit.bench import Shape, count_flops

H100_RATE = 400e12
"""Operations per second of large bf16 products on an H100; before you measure, expect several times the hours."""
BYTES_OF_TRAINING = 16
"""A parameter under training in fp32: weight, gradient, Adam's two moments."""


def shape(preset: Preset) -> Shape:
    """One layer's Lorsa and its batch."""
    p = preset
    return Shape(p.d_model, p.n_qk, p.d_head, p.n_heads, p.k, p.batch_size, p.context)


def step_flops(layer: Shape) -> float:
    """Operations per token of one Lorsa's training step."""
    share = 1 - (1 - 1 / layer.n_qk) ** layer.k  # of QK groups with a kept head at a token
    pairs = layer.batch * layer.n_qk * layer.length * (layer.length + 1) / 2 * share
    return count_flops(layer, round(pairs)) / layer.n_tokens


def lorsa_parameters(preset: Preset) -> int:
    """Weights of one layer's Lorsa."""
    p = preset
    return LorsaConfig(d_model=p.d_model, n_ov_heads=p.n_heads, n_qk_heads=p.n_qk, d_qk=p.d_head, k=p.k).n_parameters


def estimate(preset: Preset, rate: float = H100_RATE, memory: float = 80e9) -> dict[str, Any]:
    """Memory, disk and hours of all layers of a preset on one device.

    Args:
        preset: model, shape and budget.
        rate: operations per second.
        memory: bytes of the device; as many layers are trained together, from one pass of the model, as fit.

    Returns:
        `mflop_per_token_and_layer`, `model_gflop_per_token`, `layers_together`, `hours_training`, `hours_model` (its
        passes over the text, one for each group of layers), `hours`, `memory_gb` (model in bfloat16, the layers trained
        together, a step's activations), `memory_gb_per_layer` (weights, gradients, Adam), `tokens_gb` (the text's
        tokens, in the machine's own memory) and `disk_gb` (finished layers and their states).
    """
    parameters, step = lorsa_parameters(preset), step_flops(shape(preset))
    layer_bytes, model_bytes = BYTES_OF_TRAINING * parameters, 2 * preset.parameters
    activations = 16 * preset.batch_size * preset.context * preset.n_heads
    together = max(1, min(preset.n_layers, int((memory - model_bytes - activations) // layer_bytes)))
    seconds = preset.tokens / rate
    training = preset.n_layers * step * seconds / 3600
    passes = -(-preset.n_layers // together) * 2 * preset.multiplied * seconds / 3600
    return {
        "mflop_per_token_and_layer": round(step / 1e6),
        "model_gflop_per_token": round(2 * preset.multiplied / 1e9, 2),
        "layers_together": together,
        "hours_training": round(training, 2),
        "hours_model": round(passes, 2),
        "hours": round(training + passes, 2),
        "memory_gb": round((model_bytes + together * layer_bytes + activations) / 1e9, 1),
        "memory_gb_per_layer": round(layer_bytes / 1e9, 2),
        "tokens_gb": round(5 * preset.tokens / 1e9, 1),
        "disk_gb": round(preset.n_layers * layer_bytes / 1e9, 1),
    }


def train_options(preset: Preset) -> dict[str, Any]:
    """The options of `lorsa train` that a preset stands for, by their names in the parser."""
    names = ("model", "dataset", "n_heads", "n_qk", "k", "context", "tokens", "batch_size")
    return {name: getattr(preset, name) for name in names}
