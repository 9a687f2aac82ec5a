"""Published formats of Lorsa weights: two are read, one of them is written.

Language-Model-SAEs (Llamascopium) has `config.json` beside `sae_weights.safetensors`, the older OpenMOSS/Lorsa beside
`final.pth`. Their names:

    queries, keys      W_Q, W_K [n_qk, d_model, d_qk], b_Q, b_K as here; scores are divided by `attn_scale`, here
                       multiplied
    QK norm            ln_q.w, ln_k.w [n_qk, d_qk], here q_norm, k_norm: after the bias, before the rotation
    rotation           adjacent pairs or halves, both known here; "NTK by parts" is the `llama3` scaling
    reads and writes   W_V, W_O [n_ov, d_model] (older: [n_ov, d_model, 1] and [n_ov, 1, d_model]), b_V [n_ov]
                       (older: [n_ov, 1])
    output bias        b_D, older b_O, here b_O
    selection          act_fn `topk`: relu(z) ||w_o||; older: |z| ||w_o||, or relu with `use_z_relu`; `relu` and no
                       top-k keep all heads

Weights may expect inputs and outputs of mean norm sqrt(d_model) (`norm_activation` "dataset-wise", older always). A
folder can say so with the scales already folded in, and its input can be the norm's output without its gain:
`READINGS` are the ways to understand a folder.

Where fewer than K heads are active, the older code lets inactive heads through; here they stay silent.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorsa_utils import store
from lorsa_utils.config import LorsaConfig, RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import Lorsa, Scaling
from lorsa_utils.selection import FIXED_K, SCORES
from lorsa_utils.training import QK_PARAMETERS

NAMES = {name: name for name in ("W_Q", "W_K", "b_Q", "b_K", "W_V", "b_V", "W_O", "b_O")}
NAMES |= {"b_D": "b_O", "ln_q.w": "q_norm", "ln_k.w": "k_norm"}
"""Their names and ours."""
BUFFERS = {"mask", "IGNORE", "rotary_sin", "rotary_cos"}
NORM_PREFIX = "dataset_average_activation_norm."
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "sae_type": ("lorsa",),
    "act_fn": FIXED_K,
    "norm_activation": ("dataset-wise", "inference"),
    "rotary_scale": (1,),
    "virtual_kv_num": (0,),
    "d_ov_head": (1,),
}
"""Settings that are supported with these values only."""
ROTARY = {
    "rotary_dim": "rotary_dim",
    "rotary_base": "theta",
    "rotary_adjacent_pairs": "adjacent_pairs",
    "NTK_by_parts_factor": "factor",
    "NTK_by_parts_low_freq_factor": "low_freq_factor",
    "NTK_by_parts_high_freq_factor": "high_freq_factor",
    "old_context_len": "original_context",
}
"""Their settings of the rotation and ours; the last four belong to NTK by parts."""
_OTHERS = """
d_model expansion_factor use_decoder_bias sparsity_include_decoder_norm top_k n_qk_heads d_qk_head n_ctx hook_point_in
hook_point_out positional_embedding_type use_NTK_by_parts_rope attn_scale use_post_qk_ln normalization_type eps
n_ov_heads avg_norm mode use_z_relu layer model_name
device dtype use_triton_kernel sparsity_threshold_for_triton_spmm_kernel jumprelu_threshold_window skip_bos
"""
KNOWN = {*SUPPORTED, *ROTARY, *_OTHERS.split()}
"""Settings whose meaning is known; the last line of `_OTHERS` does not affect what is computed."""
READINGS = {
    "normalised activations": (True, True),
    "normalised activations, before the gain of the norm": (True, False),
    "raw activations": (False, True),
    "raw activations, before the gain of the norm": (False, False),
}
"""Whether inputs and outputs are scaled by the stated norms; whether the input is the norm's output with gain and bias,
which is what attention reads."""
Gain = tuple[Tensor, Tensor]
"""Weight and bias [d_model] of the norm before the attention."""


@dataclass(frozen=True)
class Published:
    """A checkpoint with its weights as in the file."""

    format: Literal["llamascopium", "openmoss-lorsa"]
    lorsa: Lorsa
    reading: str
    """What its config says, one of `READINGS`."""
    norms: tuple[float, float] | None
    """Mean norms of inputs and outputs, if stated."""
    layer: int | None
    context: int
    keys: dict[str, str]
    """Their tensors and ours."""
    ignored: list[str]
    sha256: str

    def readings(self, gain: Gain) -> list[str]:
        """All that can be tried, the config's own first."""
        size, scaled = math.sqrt(self.lorsa.config.d_model), {self.norms is not None, False}
        if self.norms and all(math.isclose(norm, size, rel_tol=1e-6) for norm in self.norms):
            scaled = {READINGS[self.reading][0]}  # both are the same
        inside = {True, not (gain[0].abs() > 1e-6).all()}
        choices = [name for name, (is_scaled, within) in READINGS.items() if is_scaled in scaled and within in inside]
        return sorted(choices, key=lambda reading: reading != self.reading)

    @torch.no_grad()
    def as_read(self, reading: str, gain: Gain | None = None) -> Lorsa:
        """The Lorsa for raw attention inputs and outputs; UserError if it needs norms that are not known.

        `gain` is needed by readings before it.
        """
        lorsa, d_model, (is_scaled, has_gain) = copy.deepcopy(self.lorsa), self.lorsa.config.d_model, READINGS[reading]
        if is_scaled:
            if self.norms is None:
                raise UserError(
                    "This checkpoint wants normalised activations but does not state their norms; "
                    "give --model, to measure it on text."
                )
            lorsa.fold(Scaling(torch.zeros(d_model), *(math.sqrt(d_model) / norm for norm in self.norms)))
        if not has_gain:
            assert gain is not None
            scale, bias = (side.float().cpu() for side in gain)
            for weight in (lorsa.W_Q, lorsa.W_K):
                weight.div_(scale[:, None])
            lorsa.W_V.div_(scale)
            lorsa.shift_inputs(bias)
        return lorsa


# ---- reading


def read(path: Path) -> Published:
    """Read either format; UserError if files are missing or damaged, or an option, which is named, is unsupported."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give the folder of a published Lorsa.")
    config = store.read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} holds no settings; restore a copy.")
    file = next((path / name for name in ("sae_weights.safetensors", "final.pth") if (path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{path} has neither sae_weights.safetensors nor final.pth; give the folder of a published Lorsa."
        )
    is_older = file.suffix == ".pth"
    tensors = _read_pickled(file) if is_older else store.read_tensors(file)
    weights = _renamed(tensors, file)
    _check_settings(config, weights, path)
    stated = config.get("avg_norm") or {
        side: tensors.get(NORM_PREFIX + str(config.get(f"hook_point_{side}"))) for side in ("in", "out")
    }
    norms = [float(stated[side]) for side in ("in", "out") if stated.get(side) is not None]
    is_scaled = is_older or config.get("norm_activation", "dataset-wise") == "dataset-wise"
    number = re.search(r"(?:blocks|layers|h)\.(\d+)\.", str(config.get("hook_point_in", "")))
    return Published(
        format="openmoss-lorsa" if is_older else "llamascopium",
        lorsa=_filled(_shape(config, weights, is_older, path), weights, file),
        reading=f"{'normalised' if is_scaled else 'raw'} activations",
        norms=(norms[0], norms[1]) if len(norms) == 2 and all(0 < norm < math.inf for norm in norms) else None,
        layer=config.get("layer", int(number[1]) if number else None),
        context=int(config.get("n_ctx", 256)),
        keys={name: NAMES[name] for name in tensors if name in NAMES},
        ignored=sorted(set(config) - KNOWN),
        sha256=store.sha256_file(file),
    )


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a torch file, whose code is never run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and the unpickler raise many types
        if "GLOBAL" in str(error):  # the unpickler's word for a function that the file wants to call
            raise UserError(
                f"{file} wants to run code when it is read, which is refused; ask for safetensors."
            ) from error
        raise UserError(f"{file} is damaged ({type(error).__name__}); download it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file} is no list of named tensors; give the final.pth of a published Lorsa.")
    return tensors


def _renamed(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Float32 weights by our names, without dimensions of size 1."""
    theirs = [name for name in tensors if name not in BUFFERS and not name.startswith(NORM_PREFIX)]
    if unknown := sorted(set(theirs) - set(NAMES)):
        raise UserError(
            f"{file} holds {unknown[0]}, which Lorsa here does not have; only {', '.join(sorted(NAMES))} are known."
        )
    weights = {NAMES[name]: tensors[name].float() for name in theirs}
    if missing := [name for name in ("W_Q", "W_K", "W_V", "W_O") if name not in weights]:
        raise UserError(f"{file} has no {missing[0]}; give the weights of a published Lorsa.")
    for name, width, full in (("W_V", 2, 3), ("W_O", 1, 3), ("b_V", 1, 2)):
        if name in weights and weights[name].dim() == full:
            weights[name] = weights[name].squeeze(width)
    return weights


def _filled(config: LorsaConfig, weights: Mapping[str, Tensor], file: Path) -> Lorsa:
    """Missing biases are zero; fewer QK circuits than groups are shared by neighbours."""
    lorsa = Lorsa(config)
    state = lorsa.state_dict()
    for name, value in weights.items():
        if name in QK_PARAMETERS and value.shape[0] and config.n_qk_heads % value.shape[0] == 0:
            value = value.repeat_interleave(config.n_qk_heads // value.shape[0], dim=0)
        if not torch.isfinite(value).all():
            raise UserError(f"{file}: {name} holds values that are not finite; download it again.")
        state[name] = value
    if config.qk_norm and not {"q_norm", "k_norm"} <= weights.keys():
        raise UserError(f"{file} has no q_norm or no k_norm; give the weights of a published Lorsa.")
    try:
        lorsa.load_state_dict(state)
    except RuntimeError as error:  # torch names the tensors, in several lines
        problems = " ".join(str(error).split("\n\t")[1:])
        raise UserError(f"{file} does not fit its config ({problems.rstrip('. ')}); download both again.") from error
    return lorsa.requires_grad_(False)


# ---- settings


def _check_settings(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse unsupported settings, and a config that belongs to other weights."""
    for name, values in SUPPORTED.items():
        value = config.get(name, values[0])
        if (value.lower() if isinstance(value, str) else value) not in values:
            supported = " or ".join(map(str, values))
            raise UserError(
                f"{path} has {name} {value!r}, which Lorsa here does not have; only {supported} is supported."
            )
    n_ov, d_model = weights["W_V"].shape[:2]
    lengths = weights["W_O"].flatten(1).norm(dim=1)
    ignores_lengths = _is_topk(config) and not config.get("sparsity_include_decoder_norm", True)
    if ignores_lengths and (lengths / lengths[0] - 1).abs().max() > 1e-4:
        raise UserError(
            f"{path} selects without the length of w_o (sparsity_include_decoder_norm false), "
            "which Lorsa here does not have."
        )
    if config.get("use_post_qk_ln") and config.get("normalization_type", "RMS") != "RMS":
        raise UserError(
            f"{path} norms queries and keys by {config['normalization_type']} (normalization_type); "
            "only RMS is supported."
        )
    # Their number of heads is d_model times a rounded expansion_factor: the weights know better.
    if "expansion_factor" in config and abs(config["expansion_factor"] * d_model - n_ov) >= 1:
        raise UserError(
            f"{path}: expansion_factor {config['expansion_factor']} does not fit {n_ov} heads; download both again."
        )
    if config.get("mode") == "top_k" and not config.get("top_k"):
        raise UserError(f"{path} has mode top_k but no top_k; restore its config.json.")


def _is_topk(config: Mapping[str, Any]) -> bool:
    return config.get("mode", str(config.get("act_fn")).lower()) in ("top_k", "topk")


def _shape(config: Mapping[str, Any], weights: Mapping[str, Tensor], is_older: bool, path: Path) -> LorsaConfig:
    n_ov, d_model = weights["W_V"].shape[:2]
    n_qk, _, d_qk = weights["W_Q"].shape
    is_topk = _is_topk(config)
    try:
        d_qk = int(config.get("d_qk_head", d_qk))
        return LorsaConfig(
            d_model=d_model,
            n_ov_heads=n_ov,
            n_qk_heads=int(config.get("n_qk_heads", n_qk)),
            d_qk=d_qk,
            k=int(config.get("top_k", 50)) if is_topk else n_ov,
            attn_scale=1 / float(config.get("attn_scale") or math.sqrt(d_qk)),
            rotary=_rotary(config, path),
            qk_norm=bool(config.get("use_post_qk_ln", False)),
            qk_norm_eps=float(config.get("eps", 1e-6)),
            score="abs" if is_older and not (is_topk and config.get("use_z_relu")) else "relu",
        )
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path / 'config.json'} is incomplete or damaged ({error}); restore a copy.") from error


def _rotary(config: Mapping[str, Any], path: Path) -> RotaryConfig:
    if config.get("positional_embedding_type", "rotary") != "rotary":
        return RotaryConfig()
    defaults = {"rotary_base": 10000, "rotary_adjacent_pairs": "sae_type" in config, "NTK_by_parts_factor": 1}
    defaults |= {"NTK_by_parts_low_freq_factor": 1, "NTK_by_parts_high_freq_factor": 1, "old_context_len": 2048}
    settings = {}
    for theirs, ours in ROTARY.items():
        convert = type(getattr(RotaryConfig, ours))  # of its default
        settings[ours] = convert({**defaults, **config}[theirs])
    if not config.get("use_NTK_by_parts_rope") or settings["factor"] == 1:
        return RotaryConfig(rope_type="default", **{ours: settings[ours] for ours in [*ROTARY.values()][:3]})
    if settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise UserError(
            f"{path} has NTK_by_parts_low_freq_factor {settings['low_freq_factor']} and no larger high one; "
            "only blends between the two are supported."
        )
    return RotaryConfig(rope_type="llama3", **settings)


# ---- writing


def write_llamascopium(lorsa: Lorsa, run: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write a Lorsa for raw activations as Language-Model-SAEs reads it; returns our names to theirs.

    `run` is the config.json of its run. UserError names an option that the format does not have.
    """
    config = llamascopium_config(lorsa.config, run)
    names = {ours: theirs for theirs, ours in NAMES.items() if theirs != "b_O"}
    tensors = {names[name]: value for name, value in lorsa.state_dict().items()}
    norm = torch.tensor(math.sqrt(lorsa.config.d_model))  # with this norm the other reading would change nothing
    tensors |= {NORM_PREFIX + config[f"hook_point_{side}"]: norm.clone() for side in ("in", "out")}
    store.write_tensors(folder / "sae_weights.safetensors", tensors, {"version": "lorsa-utils"})
    store.write_json(folder / "config.json", config)
    return {name: names[name] for name in lorsa.state_dict()}


def llamascopium_config(config: LorsaConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Its config.json."""
    rotary, layer = config.rotary, run.get("layer") or 0
    if not SCORES[config.score]:
        what = "Selection by |z|" if config.k < config.n_ov_heads else "A layer that keeps every head with its sign"
        raise UserError(
            f"{what} (score {config.score}) is unknown to Language-Model-SAEs; only score relu can be exported."
        )
    if rotary.rope_type == "linear":
        raise UserError("RoPE scaling 'linear' is unknown to Language-Model-SAEs; default and llama3 can be exported.")
    if rotary.theta != int(rotary.theta):
        raise UserError(f"Language-Model-SAEs wants a whole number as base of RoPE, not {rotary.theta}.")
    factor = config.n_ov_heads / config.d_model
    while int(config.d_model * factor) < config.n_ov_heads:  # they round down
        factor = math.nextafter(factor, math.inf)
    return {
        "sae_type": "lorsa",
        "d_model": config.d_model,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "top_k": config.k,
        "hook_point_in": f"blocks.{layer}.ln1.hook_normalized",
        "hook_point_out": f"blocks.{layer}.hook_attn_out",
        "n_qk_heads": config.n_qk_heads,
        "d_qk_head": config.d_qk,
        "positional_embedding_type": "none" if rotary.rope_type == "none" else "rotary",
        **{theirs: getattr(rotary, ours) for theirs, ours in ROTARY.items()},
        "rotary_base": int(rotary.theta),
        "rotary_scale": 1,
        "use_NTK_by_parts_rope": rotary.rope_type == "llama3",
        "n_ctx": run.get("source", {}).get("context", 256),
        "attn_scale": 1 / (config.attn_scale or config.d_qk**-0.5),
        "use_post_qk_ln": config.qk_norm,
        "normalization_type": "RMS" if config.qk_norm else None,
        "eps": config.qk_norm_eps,
    }
