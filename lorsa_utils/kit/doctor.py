"""What this machine has and lacks, and what a profile, or training all Lorsa layers of a preset, would cost here.

Costs are by arithmetic. A step's operations are those of `bench.count_flops`, as if heads were kept at random, which
decides the share of queries that the attention's backward pass visits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import timeit
from typing import Any

import psutil
import torch

from lorsa_utils import store
from lorsa_utils.activations import bytes_per_sequence
from lorsa_utils.config import PRESETS, Preset, Profile, get_preset, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.fetch import EMBEDDED_NAME
from lorsa_utils.kit.bench import Shape, count_flops
from lorsa_utils.kit.notebook import check_versions, provenance
from lorsa_utils.kit.reproduce import expected_minutes
from lorsa_utils.view.figures import can_draw_png

PACKAGES = {
    "papermill": "notebooks cannot be run by `lorsa reproduce`; pip install 'lorsa-utils[notebooks]'",
    "datasets": "--dataset does not work; pip install 'lorsa-utils[hub]'",
}
H100_RATE = 400e12
"""Operations per second of large bf16 products on an H100; expect several times the hours until you measure."""
BYTES_OF_TRAINING = 16
"""Of a parameter in fp32: weight, gradient, Adam's two moments."""


# ---- what is here


def report(profile: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """What `lorsa doctor` prints; `missing` has one sentence per missing thing, with its fix."""
    memory, embedded = psutil.virtual_memory(), store.data_dir() / "models" / EMBEDDED_NAME
    fetched, images = (embedded / "source.json").is_file(), can_draw_png()
    missing = [] if fetched else ["the embedded model: it is fetched when first needed, or now by `lorsa fetch`"]
    missing += [] if images else ["Chrome or Chromium: figures have no static images; install chromium"]
    missing += [f"{name}: {effect}" for name, effect in PACKAGES.items() if importlib.util.find_spec(name) is None]
    try:
        check_versions()
    except UserError as error:
        missing.append(str(error))
    answer: dict[str, Any] = {
        **provenance(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "data": str(store.data_dir()),
        "disk_free_gb": round(store.free_bytes(store.data_dir()) / 1e9, 1),
        "embedded_model": str(embedded) if fetched else None,
        "static_images": images,
        "missing": missing,
    }
    if profile:
        answer["estimate"] = profile_estimate(profile)
    if preset:
        answer["preset"] = preset_estimate(preset)
    return answer


# ---- costs


def shape(size: Profile, d_model: int, d_head: int) -> Shape:
    """One layer's Lorsa and its batch."""
    return Shape(d_model, size.n_qk, d_head, size.n_heads, size.k, size.batch_size, size.context)


def step_flops(layer: Shape) -> float:
    """Operations per token of one Lorsa's training step."""
    share = 1 - (1 - 1 / layer.n_qk) ** layer.k  # of QK groups with a kept head at a token
    pairs = layer.batch * layer.n_qk * layer.length * (layer.length + 1) / 2 * share
    return count_flops(layer, round(pairs)) / layer.n_tokens


def estimate(preset: Preset, rate: float = H100_RATE, memory: float = 80e9) -> dict[str, Any]:
    """Memory, disk and hours of all layers, on a device of `rate` operations per second and `memory` bytes.

    As many layers as fit are trained together, from one pass of the model. `hours_model` are all its passes;
    `memory_gb` holds the model in bfloat16, the layers trained together and a step's activations, `memory_gb_per_layer`
    weights, gradients and Adam; `tokens_gb`, the text, is main memory; `disk_gb` holds finished layers and their
    states.
    """
    layer = shape(preset, preset.d_model, preset.d_head)
    step, layer_bytes = step_flops(layer), BYTES_OF_TRAINING * layer.config().n_parameters
    model_bytes = 2 * preset.parameters
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


def matmul_rate() -> float:
    """Floating-point operations per second in one large matrix product on the default device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)
    # reading a value waits for the device
    return 2 * 1024**3 / min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=4))


def preset_estimate(name: str) -> dict[str, Any]:
    """Hours, memory and disk of a preset, at an H100's rate and at this machine's."""
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


def profile_estimate(name: str) -> dict[str, Any]:
    """Minutes, disk and memory; minutes that were not measured come from this machine's matrix rate."""
    profile = get_profile(name)
    size, n_layers, d_model, d_head = 106e6, 30, 576, 64  # smollm2
    for preset in PRESETS.values():
        if preset.model == profile.model:
            size, n_layers, d_model, d_head = preset.multiplied, preset.n_layers, preset.d_model, preset.d_head
    layer = shape(profile, d_model, d_head)
    saes = 2 * d_model * (profile.n_heads + profile.sae_features_equal_parameters)
    layers = {*profile.layers, profile.layer}
    minutes, source = math.nan, "of the last run here, else stated in the notebooks"
    with contextlib.suppress(UserError):  # the package without its notebooks
        minutes = expected_minutes(name)
    if math.isnan(minutes):
        # Operations per token: the model's forward pass once, a step of every Lorsa, about 3 for each weight of an SAE.
        forward = 2 * size * (max(layers) + 1) / n_layers
        lorsas = step_flops(layer) * (1 + len(profile.layers))
        operations = profile.train_tokens * (forward + lorsas + 3 * len(profile.layers) * saes)
        minutes, source = operations / matmul_rate() / 60, "by arithmetic, rough"
    sequences = (profile.cache_tokens + profile.held_out_tokens) // (profile.context - 1) + 1
    disk = sequences * bytes_per_sequence(d_model, len(layers), profile.context, "bfloat16")
    memory = (
        4 * 1.5 * size
        + len(profile.layers) * BYTES_OF_TRAINING * (layer.config().n_parameters + saes)
        + 64 * profile.batch_size * profile.context * profile.n_heads
    )
    return {
        "profile": name,
        "minutes": round(minutes, 1),
        "minutes_are": source,
        "disk_gb": round(disk / 1e9 + 1.2, 1),
        "memory_gb": round(memory / 1e9 + 1.0, 1),
    }
