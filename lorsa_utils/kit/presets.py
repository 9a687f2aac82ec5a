"""What training all Lorsa layers of a preset costs, by arithmetic.

A step's operations are those of `bench.count_flops`, as if heads were kept at random, which decides the share of
queries that the attention's backward pass visits. All else follows from the preset.
"""

from __future__ import annotations

import time
from typing import Any

from lorsa_utils.config import PRESETS, LorsaConfig, Preset, get_preset, get_profile
from lorsa_utils.kit.bench import Shape, count_flops

H100_RATE = 400e12
"""Operations per second of large bf16 products on an H100; expect several times the hours until you measure."""
BYTES_OF_TRAINING = 16
"""Of a parameter in fp32: weight, gradient, Adam's two moments."""


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
    """Memory, disk and hours of all layers, on a device of `rate` operations per second and `memory` bytes.

    As many layers as fit are trained together, from one pass of the model. `hours_model` are all its passes;
    `memory_gb` holds the model in bfloat16, the layers trained together and a step's activations, `memory_gb_per_layer`
    weights, gradients and Adam; `tokens_gb`, the text, is main memory; `disk_gb` holds finished layers and their
    states.
    """
    parameters, step = lorsa_parameters(preset), step_flops(shape(preset))
    layer_bytes, model_bytes = BYTES_OF_TRAINING * parameters, 2 * preset.parameters
    activations = 16 * preset.batch_size * preset.context * preset.n_heads
    together = max(1, min(preset.n_layers, int((memory - model_bytes - activations) // layer_bytes)))
    seconds = preset.train_tokens / rate
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
        "tokens_gb": round(5 * preset.train_tokens / 1e9, 1),
        "disk_gb": round(preset.n_layers * layer_bytes / 1e9, 1),
    }


def train_options(preset: Preset) -> dict[str, Any]:
    """The options of `lorsa train` that a preset stands for."""
    names = ("model", "dataset", "n_heads", "n_qk", "k", "context", "batch_size")
    return {name: getattr(preset, name) for name in names} | {"tokens": preset.train_tokens}


# ---- what `lorsa doctor` says


def matmul_rate() -> float:
    """Floating-point operations per second in one large matrix product on the default device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)

    def product() -> float:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        return time.perf_counter() - began

    return 2 * 1024**3 / min(product() for _ in range(4))


def preset_estimate(name: str) -> dict[str, Any]:
    """Hours, memory and disk of a preset, at an H100's rate and at this machine's."""
    import psutil
    import torch

    preset = get_preset(name)
    here = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
    return {
        "name": name,
        "model": preset.model,
        "licence": preset.licence,
        "shape_from": preset.source,
        "layers": preset.n_layers,
        "tokens": preset.train_tokens,
        "how": "by arithmetic, not measured; expect several times the hours",
        f"at {H100_RATE / 1e12:.0f} TFLOP/s and 80 GB (H100)": estimate(preset),
        "at this machine's rate and memory": estimate(preset, matmul_rate(), here),
    }


def profile_estimate(name: str, measured_minutes: float | None) -> dict[str, Any]:
    """Minutes, disk and memory; minutes that were not measured come from this machine's matrix rate."""
    from lorsa_utils.activations import bytes_per_sequence

    profile = get_profile(name)
    shapes = {
        preset.model: (preset.multiplied, preset.n_layers, preset.d_model, preset.d_head) for preset in PRESETS.values()
    }
    size, n_layers, d_model, d_head = shapes.get(profile.model, (106e6, 30, 576, 64))  # smollm2
    lorsa = 2 * d_model * (profile.n_qk * d_head + profile.n_heads)
    saes = 2 * d_model * (profile.n_heads + profile.sae_features_equal_parameters)
    minutes = measured_minutes
    if minutes is None:
        # Operations per token: the model's forward pass once, a step of every Lorsa, about 3 for each weight of an SAE.
        forward = 2 * size * (max(*profile.layers, profile.layer) + 1) / n_layers
        layer = Shape(d_model, profile.n_qk, d_head, profile.n_heads, profile.k, profile.batch_size, profile.context)
        steps = step_flops(layer) * (1 + len(profile.layers)) + 3 * len(profile.layers) * saes
        minutes = profile.train_tokens * (forward + steps) / matmul_rate() / 60
    sequences = (profile.cache_tokens + profile.held_out_tokens) // (profile.context - 1) + 1
    disk = sequences * bytes_per_sequence(d_model, len({*profile.layers, profile.layer}), profile.context, "bfloat16")
    memory = (
        4 * 1.5 * size
        + len(profile.layers) * 16 * (lorsa + saes)
        + 64 * profile.batch_size * profile.context * profile.n_heads
    )
    return {
        "profile": name,
        "minutes": round(minutes, 1),
        "minutes_are": "by arithmetic, rough"
        if measured_minutes is None
        else "of the last run here, else stated in the notebooks",
        "disk_gb": round(disk / 1e9 + 1.2, 1),
        "memory_gb": round(memory / 1e9 + 1.0, 1),
    }
